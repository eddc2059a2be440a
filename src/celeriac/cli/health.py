"""`celeriac health worker|beat|web`: a probe that imports nothing of the application."""

import argparse
from collections.abc import Sequence

from celeriac.health import PATIENCE, ROLES, HealthError, check, check_web

ABOUT = "Say in one line whether a process of this machine is well."


def health(arguments: Sequence[str]) -> int:
    """Print one line; 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="celeriac health", description=ABOUT)
    parser.add_argument("role", choices=[*ROLES, "web"])
    parser.add_argument(
        "--ready", action="store_true", help="whether it can do its work, not just whether it lives"
    )
    parser.add_argument("--name", default="", help="the node, where several run on this machine")
    parser.add_argument(
        "--within", type=float, default=PATIENCE, metavar="SECONDS", help="silence that is forgiven"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8010/health-check", help="what the web side is asked for"
    )
    asked = parser.parse_args(arguments)
    try:
        if asked.role == "web":
            print(check_web(asked.url, ready=asked.ready))
        else:
            print(check(asked.role, asked.name, ready=asked.ready, patience=asked.within))
    except HealthError as error:
        print(error)
        return 1
    return 0
