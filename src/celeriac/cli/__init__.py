"""The command line. Each subcommand has a module of its own and imports the heavy parts late."""

import click

from celeriac.cli.dev import dev
from celeriac.cli.settings import settings


@click.group()
@click.version_option(package_name="celeriac")
def main() -> None:
    """Celery for FastAPI and Flask, as if they had been built together."""


main.add_command(dev)
main.add_command(settings)
