"""The Celery app that a command is about."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from celeriac.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

app_option = click.option(
    "-A", "--app", "--celery", "path", default="main.celery", show_default=True,
    help="The Celery app, or its module, as for Celery's own commands.",
)  # fmt: skip


def load(path: str) -> "Celery":
    """The app that `celery -A path` finds, from the folder that the command is called in.

    Raises ConfigurationError.
    """
    from celery import Celery  # --help does without it
    from celery.app.utils import find_app

    sys.path.insert(0, str(Path.cwd()))
    try:
        found = find_app(path)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"no Celery app {path}: {error}; name another with -A") from None
    if not isinstance(found, Celery):
        raise ConfigurationError(
            f"{path} is no Celery app but a {type(found).__name__}: name the app itself, "
            "as in -A main.celery"
        )
    return found
