"""The command line."""

import sys


def main() -> None:
    """Run the command that the arguments name."""
    if sys.argv[1:2] == ["health"]:
        # It is started every few seconds: importing click would cost as much again as all the rest.
        from celeriac.cli.health import health

        sys.exit(health(sys.argv[2:]))
    from celeriac.cli.commands import commands

    commands(prog_name="celeriac")
