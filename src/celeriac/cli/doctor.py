"""`celeriac doctor`: what endangers the tasks, and what to do about it."""

import json
import sys
import textwrap
from dataclasses import asdict

import click

from celeriac.app import settings_of
from celeriac.cli.apps import app_option, load
from celeriac.doctor import Finding, Severity, examine
from celeriac.errors import ConfigurationError, exit_on_error

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_WIDTH = 100


@click.command()
@app_option
@click.option("--flower", "flower_url", help="Where Flower is; by default what FLOWER_URL says.")
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON.")
def doctor(path: str, flower_url: str | None, as_json: bool) -> None:
    """Examine the configuration and the live services; name every hazard and its remedy.

    The exit code is 1 if there is an error among the findings.
    """
    with exit_on_error():
        app = load(path)
    try:
        settings = settings_of(app)
    except ConfigurationError:  # an app of somebody's own
        settings = None
    found = examine(app, settings, flower_url=flower_url)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            _show(finding)
        click.echo(_summary(found))
    sys.exit(any(finding.severity is Severity.ERROR for finding in found))


def _show(finding: Finding) -> None:
    label = click.style(f"{finding.severity:8}", fg=_COLOURS[finding.severity], bold=True)
    indent = " " * 8
    text = textwrap.fill(
        f"{finding.check}: {finding.what}", _WIDTH, initial_indent=indent, subsequent_indent=indent
    )
    click.echo(label + text.removeprefix(indent))
    remedy = textwrap.fill(
        finding.remedy, _WIDTH, initial_indent=f"{indent}→ ", subsequent_indent=f"{indent}  "
    )
    click.echo(remedy)


def _summary(found: list[Finding]) -> str:
    counts = {each: sum(f.severity is each for f in found) for each in Severity}
    parts = [f"{n} {each}{'s' if n != 1 else ''}" for each, n in counts.items() if n]
    return ", ".join(parts) or "nothing found"
