"""`celeriac dev`: everything that a project needs while it is written, from one command."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from celeriac.cli import plan
from celeriac.cli.data import DataFolder
from celeriac.cli.plan import USUAL_FLOWER_PORT, USUAL_PORT, Options
from celeriac.cli.ports import check_free
from celeriac.cli.project import ExtraProcess, extra_processes, user_settings
from celeriac.errors import ConfigurationError, exit_on_error

_PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--app", default="main:app", show_default=True, help="The web application.")
@click.option("--celery", default="main.celery", show_default=True, help="The Celery app.")
@click.option("--web/--no-web", default=True, help="Leave the web server out.")
@click.option("--flower/--no-flower", default=True, help="Leave Flower out.")
@click.option("--beat/--no-beat", default=True, help="Leave Celery beat out.")
@click.option("--reload/--no-reload", default=True, help="Do not watch the Python files.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0, 64))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=USUAL_PORT, show_default=True, type=_PORT)
@click.option("--flower-port", type=_PORT, help="Default: moves with --port, 5557 beside 8010.")
@click.option(
    "--data",
    default=".data",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for the embedded Valkey, the database, beat's schedule.",
)
def dev(**given: Any) -> None:
    """Start web, worker, beat, Flower and, where none is named, a Redis of its own.

    Run it in the project's folder. Ctrl-C ends everything; a changed Python file restarts web,
    worker and beat. More processes: [tool.celeriac.dev.processes.NAME] in pyproject.toml with
    command, port, env.
    """
    if given["flower_port"] is None:
        given["flower_port"] = USUAL_FLOWER_PORT + given["port"] - USUAL_PORT
    given["data"] = given["data"].resolve()
    with exit_on_error():
        _run(Options(**given))


def _run(options: Options) -> None:
    folder = Path.cwd()
    options = _normalised(options)
    plan.check(options)
    workers = [f"worker{number + 1}" for number in range(options.workers)]
    taken = {*plan.RESERVED, *workers}
    extras = extra_processes(folder, options.port - USUAL_PORT, taken)
    user = user_settings(folder)
    data = DataFolder(options.data)
    try:
        check_free(plan.ports(options, extras))
        asyncio.run(_start(options, extras, user, data))
    finally:
        data.close()


async def _start(
    options: Options, extras: list[ExtraProcess], user: Mapping[str, str], data: DataFolder
) -> None:
    from celeriac.cli.runner import Runner

    await Runner(options, extras, user, data).run()


def _normalised(options: Options) -> Options:
    """Celery's -A takes main:celery too; uvicorn takes nothing but main:app."""
    from dataclasses import replace

    celery = options.celery.replace(":", ".")
    if options.web and ":" not in options.app:
        raise ConfigurationError(f"--app must be module:attribute, got {options.app!r}")
    if "." not in celery:
        raise ConfigurationError(f"--celery must be module.attribute, got {options.celery!r}")
    return replace(options, celery=celery)
