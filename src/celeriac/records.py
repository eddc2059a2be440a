"""What is known of a task from its publishing on: its name, whose it is, its queue, when.

A hash in the status store for each task; its events are kept beside it (see `events`). Where the
broker is the same server and database, the record is written together with the message; elsewhere
right before it, and a status store that is away stops no message: the worker writes what is
missing when it begins the task.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import redis
from celery import Celery, Task, _state
from celery.backends.base import KeyValueStoreBackend
from celery.backends.redis import RedisBackend
from redis.exceptions import RedisError

from celeriac import bridge, store
from celeriac.lease import execute

logger = logging.getLogger(__name__)

Command = tuple[Any, ...]

OWNER = "celeriac_owner"  # the header of a message
ONCE = "celeriac_once"  # which of several sendings of one committed message this is
SYSTEM = "celeriac:system"  # the owner of what nobody asked for, such as beat's tasks
UNTOUCHED = 30 * 86400  # seconds beyond its ETA that a record lasts of what no worker takes
_RECENT = 1000  # tasks of one owner that are listed
_PAUSE = 5.0  # seconds without a status store that was away: each try may take two

_owner: ContextVar[str | None] = ContextVar("celeriac_owner", default=None)


@contextmanager
def as_owner(owner: str) -> Iterator[None]:
    """Whatever is published inside the block belongs to `owner`, and so does what it publishes."""
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


def current_owner() -> str:
    """That of the block around, else of the task that runs here; "" is nobody."""
    owner = _owner.get()
    if owner is None:
        task = _state.get_current_task()
        owner = owner_of(task.request) if task is not None else None
    return owner or ""


def owner_of(request: Any) -> str | None:
    """Of a task's request; None if its message was not published by celeriac."""
    owner: str | None = getattr(request, OWNER, None)
    return owner


@dataclass(frozen=True, slots=True)
class Record:
    """What was noted when a task was published, or else when a worker received it."""

    task: str
    owner: str = ""
    queue: str | None = None
    published: float = 0.0  # seconds since 1970
    expires: float | None = None  # when it is not begun any more

    @classmethod
    def read(cls, raw: bytes | str) -> "Record":
        found = json.loads(raw)
        names = "task", "owner", "queue", "published", "expires"
        return cls(**{name: found[name] for name in names if name in found})


def text_of(headers: Mapping[str, Any], owner: str, queue: str | None) -> str:
    """The record of a message, by its headers."""
    expires = _seconds(headers.get("expires"))
    ends = "" if expires is None else f', "expires": {expires}'
    named = _named(headers.get("task"), owner, queue)
    return f'{named}, "published": {time.time():.3f}{ends}}}'


@lru_cache(1024)
def _named(task: str | None, owner: str, queue: str | None) -> str:
    return json.dumps({"task": task, "owner": owner, "queue": queue})[:-1]


def _seconds(moment: Any) -> float | None:
    if moment is None:
        return None
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None


def key_of(prefix: str, task_id: str) -> str:
    return f"{prefix}celeriac:task:{task_id}"


def events_key_of(prefix: str, task_id: str) -> str:
    """The stream of a task's events, and the channel on which they are published."""
    return f"{prefix}celeriac:events:{task_id}"


def owner_key_of(prefix: str, owner: str) -> str:
    """The stream of the ids of an owner's tasks."""
    return f"{prefix}celeriac:owner:{owner}"


def commands(
    prefix: str, headers: Mapping[str, Any], queue: str | None, follows: Any = None
) -> list[Command]:
    """What writes the record of a message that is about to be published.

    And of those that follow it, by `follows`, what Celery embeds in a message: whoever published a
    chain or a chord holds the id of its last task.
    """
    task_id, owner = headers["id"], headers.get(OWNER, "")
    key = key_of(prefix, task_id)
    waits = (_seconds(headers.get("eta")) or 0) - time.time()
    kept = int(UNTOUCHED + max(0.0, waits))
    made: list[Command] = [
        ("HSET", key, "r", text_of(headers, owner, queue)),
        ("EXPIRE", key, kept),
    ]
    if follows and not headers.get("group_index"):  # the first of a chord's speaks for all
        for later, task, its_queue in _members([follows.get("chain"), follows.get("chord")]):
            later_key = key_of(prefix, later)
            text = text_of({"task": task}, owner, its_queue)
            made += [("HSETNX", later_key, "r", text), ("EXPIRE", later_key, kept)]
    if owner and not headers.get("retries") and not headers.get("replaced_task_nesting"):
        recent = owner_key_of(prefix, owner)
        made.append(("XADD", recent, "MAXLEN", "~", _RECENT, "*", "i", task_id))
        made.append(("EXPIRE", recent, UNTOUCHED))
    return made


def _members(signatures: Any) -> Iterator[tuple[str, str, str | None]]:
    """Id, name and queue of every task in these signatures that has an id."""
    for each in tasks_in(signatures):
        options = each.get("options") or {}
        task_id, queue = options.get("task_id"), options.get("queue")
        if isinstance(task_id, str):
            yield task_id, str(each.get("task")), str(queue) if queue else None


def tasks_in(signatures: Any) -> Iterator[dict[str, Any]]:
    """Every signature of a task in these, which may be canvases or lists of them."""
    if isinstance(signatures, (list, tuple)):
        for each in signatures:
            yield from tasks_in(each)
    elif isinstance(signatures, dict) and signatures.get("subtask_type") in _CANVAS:
        parts = signatures.get("kwargs") or {}
        yield from tasks_in([parts.get(name) for name in ("tasks", "header", "body")])
    elif isinstance(signatures, dict):
        yield signatures


_CANVAS = {"chain", "group", "chord"}


class Book:
    """Where one app's records are written: a Redis."""

    def __init__(self, app: Celery, prefix: str) -> None:
        self.prefix = prefix
        self.with_message = store.is_broker(app)
        self.client = store.bounded_client(app)
        finalize(app, self.client.close).atexit = False
        self._away_until = 0.0

    def write(self, made: list[Command]) -> None:
        """Blocks for at most the time limits of its client; does not raise."""
        if time.monotonic() < self._away_until:
            return
        try:
            with self.client.pipeline(transaction=False) as pipe:
                put(pipe, made)
                pipe.execute()
        except RedisError as error:
            self._away_until = time.monotonic() + _PAUSE
            logger.error("the status store is away, a task is not recorded yet: %s", error)

    def note(self, headers: Mapping[str, Any], queue: str, follows: Any = None) -> None:
        self.write(commands(self.prefix, headers, queue, follows))

    def close(self) -> None:
        """Close what is open; another use opens it again."""
        self.client.close()

    def forget(self, task_id: str) -> None:
        """The task was not published after all."""
        with suppress(RedisError):
            execute(self.client, "DEL", key_of(self.prefix, task_id))


# Not the pipeline's own, where kombu adds a prefix.
_execute: Any = redis.client.Pipeline.execute_command


class Slip:
    """The same in any other result backend that keeps values by key; they expire as results do."""

    with_message = False

    def __init__(self, app: Celery) -> None:
        self._app = ref(app)

    @property
    def _backend(self) -> Any:
        app = self._app()
        assert app is not None
        return app.backend

    def note(self, headers: Mapping[str, Any], queue: str, follows: Any = None) -> None:
        own = headers["id"], headers.get("task"), queue
        later = _members([follows.get("chain"), follows.get("chord")]) if follows else ()
        try:
            for task_id, task, its_queue in (own, *later):
                named = {**headers, "task": task}
                text = text_of(named, headers.get(OWNER, ""), its_queue)
                self._backend.set(self._key(task_id), text)
        except Exception as error:  # whatever its client raises
            logger.error("the result backend is away, a task is not recorded: %r", error)

    def read(self, task_id: str) -> Record | None:
        text = self._backend.get(self._key(task_id))
        return Record.read(text) if text else None

    def forget(self, task_id: str) -> None:
        with suppress(Exception):
            self._backend.delete(self._key(task_id))

    def close(self) -> None:
        pass

    def _key(self, task_id: str) -> Any:
        return self._backend.get_key_for_task(task_id, "-record")


def put(pipe: redis.client.Pipeline, made: Iterable[Command]) -> None:
    for command in made:
        _execute(pipe, *command)


_books: WeakKeyDictionary[Celery, Book | Slip | None] = WeakKeyDictionary()


@dataclass(slots=True)
class _Pending:
    """What is to be written together with the message of a task."""

    task_id: str
    commands: list[Command]
    taken: bool = False


_pending: ContextVar[_Pending | None] = ContextVar("celeriac_record", default=None)


def book_of(app: Celery) -> Book | Slip | None:
    """None where there is no place for records."""
    try:
        return _books[app]
    except KeyError:
        backend = app.backend
        book: Book | Slip | None = None
        if isinstance(prefix := getattr(backend, "prefix", None), str):
            book = Book(app, prefix)
        elif isinstance(backend, KeyValueStoreBackend) and not isinstance(backend, RedisBackend):
            book = Slip(app)
        _books[app] = book
        return book


def of_message(message: Mapping[str, Any]) -> list[Command]:
    """What the transport is to write together with `message`, in kombu's format."""
    pending = _pending.get()
    if pending is None or message.get("headers", {}).get("id") != pending.task_id:
        return []
    pending.taken = True
    return pending.commands


def note_eager(task: Task, task_id: str) -> None:
    """Of a task that is about to run where it was called."""
    book = book_of(task.app)
    if book is not None and task.store_eager_result:
        bridge.offload(book.note, {"id": task_id, "task": task.name, OWNER: current_owner()}, "")


def publish(
    app: Celery,
    headers: dict[str, Any],
    queue: str,
    follows: Any,
    send: Callable[[], Any],
    *,
    may_wait: Callable[[], None],
) -> Any:
    """Record the task of a message, and `send` it. `may_wait` raises where nobody waits here."""
    headers.setdefault(OWNER, current_owner())
    book = book_of(app)
    if book is None or not isinstance(headers.get("id"), str):
        return send()
    if isinstance(book, Book) and book.with_message:
        made = commands(book.prefix, headers, queue, follows)
        pending = _Pending(headers["id"], made)
        token = _pending.set(pending)
        try:
            sent = send()
        finally:
            _pending.reset(token)
        if not pending.taken:  # by a transport of kombu's own
            bridge.offload(book.write, made)
        return sent
    may_wait()
    bridge.offload(book.note, headers, queue, follows)
    try:
        return send()
    except BaseException as error:
        later = "retries", "replaced_task_nesting", ONCE  # which are of a task that there is
        if not any(map(headers.get, later)) and not getattr(error, "maybe_accepted", False):
            bridge.offload(book.forget, headers["id"])
        raise
