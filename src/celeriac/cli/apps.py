"""The Celery app that a command is about."""

import sys
from pathlib import Path

from celery import Celery
from celery.utils.imports import symbol_by_name

from celeriac.errors import ConfigurationError


def load(path: str) -> Celery:
    """The app at `module.name`, from the folder that the command is called in.

    Raises ConfigurationError.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = symbol_by_name(path)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"no Celery app {path}: {error}; see --celery") from None
    if not isinstance(found, Celery):
        raise ConfigurationError(
            f"{path} is no Celery app but a {type(found).__name__}: name the app itself, "
            "as in main.celery; see --celery"
        )
    return found
