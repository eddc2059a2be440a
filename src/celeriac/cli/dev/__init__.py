"""`celeriac dev`: everything that a project needs while it is written, from one command."""

from pathlib import Path
from typing import Any

import click

from celeriac.cli.dev.plan import USUAL_FLOWER_PORT, USUAL_PORT, Options
from celeriac.errors import exit_on_error

_PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--app", help="The web application, an ASGI one.  [default: main:app]")
@click.option("--celery", help="The Celery app.  [default: main.celery]")
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
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    help="The folder for the embedded Valkey, the database, beat's schedule.",
)
def dev(**given: Any) -> None:
    """Start web, worker, beat, Flower and, where none is named, a Redis of its own.

    Run it in the project's folder. Ctrl-C ends everything; a changed Python file restarts web,
    worker and beat. In pyproject.toml, [tool.celeriac.dev] may have app and celery; web, the
    command of another web server, with {host} and {port}; env; and more processes, in
    [tool.celeriac.dev.processes.NAME] with command, port, env.
    """
    from celeriac.cli.dev.plan import read_project
    from celeriac.cli.dev.runner import run

    with exit_on_error():
        project = read_project(Path.cwd())
    given["web_command"] = "" if given["app"] else project.web
    given["app"] = given["app"] or project.app
    # Celery's -A takes main:celery too; uvicorn takes nothing but main:app.
    given["celery"] = (given["celery"] or project.celery).replace(":", ".")
    given["flower_port"] = given["flower_port"] or USUAL_FLOWER_PORT + given["port"] - USUAL_PORT
    with exit_on_error():
        run(Options(**given), project)
