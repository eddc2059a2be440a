"""`celeriac dead`: what is kept of messages that will not run again by themselves."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from celeriac.cli.apps import app_option, load
from celeriac.errors import CeleriacError, DeadLetterError, ServiceError, exit_on_error

if TYPE_CHECKING:
    from celery import Celery

    from celeriac.dead import Letter, Letters

_LINE = 100  # characters of an error in a list
_SHOWN = 10_000  # of a body that is no JSON


@click.group()
def dead() -> None:
    """Dead letters: list them, look at one, send them again, or discard them."""


def _with_filters(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--reason", help="Only those that died of it.")(command)
    return click.option("--task", help="Only those of a task.")(command)


def _with_choice(command: Callable[..., Any]) -> Callable[..., Any]:
    command = _with_filters(command)
    command = click.option("--all", "everything", is_flag=True, help="All, or all that match.")(
        command
    )
    return click.argument("ids", nargs=-1)(command)


@contextmanager
def _opened(path: str) -> "Iterator[tuple[Celery, Letters]]":
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from celeriac.dead import letters

    with exit_on_error():
        app = load(path)
        try:
            with letters(app) as kept:
                yield app, kept
        except (OperationalError, RedisError) as error:
            raise ServiceError(f"where dead letters are kept does not answer: {error}") from error


@dead.command("list")
@app_option
@_with_filters
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="At most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each, on a line.")
def list_letters(
    path: str, task: str | None, reason: str | None, limit: int, as_json: bool
) -> None:
    """Print a line for each letter, the newest first."""
    with _opened(path) as (_, kept):
        found, count = kept.newest(limit, task=task, reason=reason), len(kept)
    for letter in found:
        click.echo(json.dumps(_fields(letter)) if as_json else _line(letter))
    if len(found) == limit < count:
        click.echo(f"the newest {limit} of {count}; more with --limit", err=True)


def _fields(letter: "Letter") -> dict[str, Any]:
    names = ("id", "task", "queue", "reason", "time", "size", "error")
    return {name: getattr(letter, name) for name in names}


def _line(letter: "Letter") -> str:
    parts = [letter.id, letter.task or "-", letter.queue or "-", letter.reason, _when(letter)]
    error = letter.error or f"{letter.size} bytes"
    if len(error) > _LINE:
        error = error[: _LINE - 1] + "…"
    return "  ".join(_safe(part) for part in (*parts, error))


def _when(letter: "Letter") -> str:
    return datetime.fromtimestamp(letter.time).astimezone().isoformat(timespec="seconds")


def _safe(text: str, *, lines: bool = False) -> str:
    """Anybody may have written it: nothing of it shall steer a terminal, or look like a line."""
    return "".join(
        each
        if each.isprintable() or (lines and each == "\n")
        else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


@dead.command("show")
@app_option
@click.argument("letter_id", metavar="ID")
def show(path: str, letter_id: str) -> None:
    """Print what is known of a letter, its headers and its body."""
    with _opened(path) as (_, kept):
        letter, raw = kept.get(letter_id)
    for name, value in (_fields(letter) | {"time": _when(letter)}).items():
        if value is not None:
            click.echo(f"{name:<7}{_safe(str(value))}")
    headers, body = _parts(raw) if letter.readable else (None, raw)
    if headers is not None:
        click.echo("\nheaders")
        click.echo(_pretty(headers))
    click.echo("\nbody")
    click.echo(_body(body))


def _parts(raw: bytes) -> tuple[Any, bytes]:
    """Headers and body of a message as kombu writes one; all of what is none is its body."""
    from base64 import b64decode

    try:
        message = json.loads(raw)
        return message["headers"], b64decode(message["body"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, raw


def _pretty(value: Any) -> str:
    return _safe(json.dumps(value, indent=2, ensure_ascii=False), lines=True)


def _body(body: bytes) -> str:
    try:
        return _pretty(json.loads(body))
    except (ValueError, RecursionError):
        rest = len(body) - _SHOWN
        more = f"\n… and {rest} bytes more" if rest > 0 else ""
        return repr(body[:_SHOWN])[1:] + more


@dead.command("retry")
@app_option
@_with_choice
def retry(
    path: str, ids: tuple[str, ...], everything: bool, task: str | None, reason: str | None
) -> None:
    """Send letters again, as tasks that wait and have not been started."""
    from celeriac.dead import sender

    _check_choice(ids, everything, task, reason)
    sent, chosen = 0, list(ids)
    with _opened(path) as (app, kept), sender(app, kept) as sending:
        chosen = chosen or kept.ids(task, reason)
        for letter in chosen:
            with _told():
                sending.send(letter)
                sent += 1
    click.echo(f"sent again: {sent}")
    if sent < len(chosen):
        raise SystemExit(1)


@dead.command("discard")
@app_option
@_with_choice
def discard(
    path: str, ids: tuple[str, ...], everything: bool, task: str | None, reason: str | None
) -> None:
    """Forget letters for ever."""
    _check_choice(ids, everything, task, reason)
    count = 0
    with _opened(path) as (_, kept):
        if everything:
            count = kept.discard(*kept.ids(task, reason))
        for letter in ids:
            with _told():
                if not kept.discard(letter):
                    raise DeadLetterError(letter)
                count += 1
    click.echo(f"discarded: {count}")
    if count < len(ids):
        raise SystemExit(1)


@contextmanager
def _told() -> Iterator[None]:
    """An error of one letter is a line, and the others follow."""
    try:
        yield
    except CeleriacError as error:
        click.echo(f"error: {_safe(str(error))}", err=True)


def _check_choice(
    ids: tuple[str, ...], everything: bool, task: str | None, reason: str | None
) -> None:
    if bool(ids) == everything:
        raise click.UsageError("name letters by their ids, or give --all")
    if ids and (task or reason):
        raise click.UsageError("--task and --reason go with --all")
