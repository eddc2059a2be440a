"""Answers in a process of its own whether the project's names exist, then migrates its database.

One process for both: importing the application is what costs. Lines that begin with `MARK` are
for the runner, everything else is the application's own output.
"""

import importlib
import sys
import traceback
from functools import reduce
from typing import Any

MARK = "\x1e"


class _RefusedError(Exception):
    """What the user reads."""


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return str(error.code).removeprefix("error: ")
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""  # says it itself
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", sys.prefix))]
    own = [frame for frame in own if frame.filename != __file__ and "importlib" not in frame.name]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _find(target: str, option: str) -> Any:
    name, _, attribute = target.rpartition(":" if ":" in target else ".")
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the application's own code: anything may come
        if isinstance(error, SystemExit) and str(error.code).startswith("error: "):
            raise _RefusedError(_reason(error)) from None  # its own words: exit_on_error's
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise _RefusedError(
                f"there is no module {name} in this folder: change to the project's folder "
                f"or name the module with {option}"
            ) from None
        raise _RefusedError(f"{name} cannot be imported: {_reason(error)}{_where(error)}") from None
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise _RefusedError(
            f"module {name} has no {attribute!r}: name another with {option}"
        ) from None


def _check(web: str, celery: str) -> None:
    from celery import Celery

    found = _find(celery, "--celery")
    if not isinstance(found, Celery):
        kind = type(found).__name__
        raise _RefusedError(f"{celery} is a {kind}, not a Celery app: name another with --celery")
    if web:
        found = _find(web, "--app (or leave it out with --no-web)")
        if not callable(found) or isinstance(found, Celery):
            raise _RefusedError(
                f"{web} is a {type(found).__name__}, not a web application: name another with --app"
            )


def _migrate() -> None:
    try:
        import alembic.command
        import alembic.config
    except ImportError:
        raise _RefusedError(
            "here is an alembic.ini, but alembic is not installed: pip install 'celeriac[db]'"
        ) from None
    try:
        alembic.command.upgrade(alembic.config.Config("alembic.ini"), "head")
    except (Exception, SystemExit) as error:  # the project's env.py and migrations are in there
        raise _RefusedError(f"alembic upgrade head failed: {_reason(error)}") from None


def main(web: str, celery: str, migrate: str) -> int:
    try:
        _check(web, celery)
        if migrate:
            _migrate()
    except _RefusedError as refusal:
        print(f"\n{MARK}{refusal}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
