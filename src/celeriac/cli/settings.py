"""`celeriac settings`: the effective value and the source of every setting."""

import click
from celery import Celery

from celeriac.app import settings_of
from celeriac.cli.apps import app_option, load
from celeriac.errors import exit_on_error
from celeriac.settings import mask


@click.command()
@app_option
def settings(path: str) -> None:
    """Print every setting: its effective value, secrets masked, and where it comes from."""
    with exit_on_error():
        rows = _rows(load(path))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        click.echo(f"{name:{widths[0]}}  {value:{min(widths[1], 60)}}  {source}")


def _rows(celery: Celery) -> list[tuple[str, str, str]]:
    """Those of the application, then Celery's options that celeriac set for it."""
    rows = settings_of(celery).explain()
    named = {name for name, _, _ in rows}
    named |= {f"CELERY_{name}" for name in named}  # ours, where Celery's configuration carries it
    for option, value in sorted(celery.conf.table().items()):
        name = f"CELERY_{option.upper()}"
        if name not in named:
            rows.append((name, mask(option, value), "celeriac"))
    return rows
