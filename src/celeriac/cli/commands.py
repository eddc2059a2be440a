"""The subcommands. Each has a module of its own."""

from importlib import import_module

import click

from celeriac.cli.health import ABOUT


class _Commands(click.Group):
    """Imports the module of the command that is called alone: some import all of Celery."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["dead", "dev", "doctor", "health", "relay", "settings"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name == "health":  # for the list of commands; `main` has run it without click
            return click.Command("health", help=ABOUT)
        command = getattr(import_module(f"celeriac.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands)
@click.version_option(package_name="celeriac")
def commands() -> None:
    """Celery for FastAPI and Flask, as if they had been built together."""
