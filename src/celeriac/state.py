"""The states of tasks: what is shown of one, and how it is read from where it is kept."""

import json
import logging
from dataclasses import dataclass, field, replace
from typing import Any, Self

import redis
from celery import Celery, states
from pydantic_core import from_json

from celeriac import events, records, store
from celeriac.lease import execute
from celeriac.records import Record

logger = logging.getLogger(__name__)

_TOLD = ("state", "result", "error", "code", "safe", "time", "retry_at")
_UNREADABLE = ValueError, TypeError, KeyError, RecursionError
TERMINAL = states.READY_STATES


@dataclass(frozen=True, slots=True)
class Event:
    """A free-form event of a task's, such as a line of its log or a part of its result."""

    task_id: str
    id: int
    event: str
    data: Any = None
    time: float | None = None

    # So that whoever asks for no such events need not tell them apart.
    state = result = error = code = None
    terminal, recovered = False, True

    def as_json(self) -> dict[str, Any]:
        """`{"task_id", "id", "event", "data"}`."""
        return {"task_id": self.task_id, "id": self.id, "event": self.event, "data": self.data}


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one task as its owner may see it: no traceback, no arguments."""

    task_id: str
    state: str
    result: Any = None
    """The value of a SUCCESS; what a PROGRESS, or a state of the task's own, reports."""
    error: str | None = None
    """One line: why it is FAILURE, RETRY or REVOKED."""
    code: str | None = None
    """The same for programs: the error's class, or a PublicError's code."""
    safe: bool = field(default=False, compare=False)
    """Whether the error was written for whoever asked for the task."""
    id: int | None = field(default=None, compare=False)
    """The number of the event; None for what a worker without the library reports."""
    time: float | None = field(default=None, compare=False)
    """When, in seconds since 1970."""
    retry_at: float | None = field(default=None, compare=False)
    """When a RETRY is due, in seconds since 1970."""
    waiting: str | None = field(default=None, compare=False)
    """Why a PENDING task may not begin soon."""
    recovered: bool = field(default=True, compare=False)
    """False where events between the last one seen and this state are lost."""
    record: Record | None = field(default=None, compare=False, repr=False)
    """What was noted when it was published; in a snapshot."""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    def as_json(self) -> dict[str, Any]:
        """`{"task_id", "state"}`, and what else there is: `"id"`, `"result"`, `"error"`…"""
        message: dict[str, Any] = {"task_id": self.task_id, "state": self.state}
        for name in ("id", "error", "code", "time", "retry_at", "waiting"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.error is None and self.result is not None:
            message["result"] = from_json(events.text_of(self.result))
        if not self.recovered:
            message["recovered"] = False
        return message

    @classmethod
    def from_meta(cls, task_id: str, meta: dict[str, Any] | None) -> Self:
        """From what Celery's backend keeps of a task; None is a task that has not begun."""
        if meta is None:
            return cls(task_id, states.PENDING)
        state, result = meta["status"], meta.get("result")
        if state in states.EXCEPTION_STATES:
            return cls(task_id, state, **events.error_of(result))
        # STARTED holds the worker's process id and host: nobody's business.
        return cls(task_id, state, None if state == states.STARTED else result)


@dataclass(frozen=True, slots=True)
class Known:
    """What the status store has of a task at one moment."""

    task_id: str
    count: int  # of its events
    status: Status | None  # None where nothing is known


class States:
    """Those of one app's tasks, as they are kept."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def known(self, task_id: str, record: Any, meta: bytes | None) -> Known:
        """The event that was told last, or else what Celery has stored.

        Both are written in one step: where they differ, a worker without the library has gone on.
        """
        kept: dict[bytes, bytes] = record if isinstance(record, dict) else {}
        count = int(kept.get(b"n", 0))
        noted = self._read_record(task_id, kept[b"r"]) if b"r" in kept else None
        if not kept and meta is None:
            return Known(task_id, 0, None)
        stored = self.decode(task_id, meta)
        number, _, text = kept.get(b"s", b"0 ").partition(b" ")
        told = self.read_event(task_id, int(number), text) if text else None
        if isinstance(told, Status):
            apart = kept.get(b"x") == number + b" " + stored.state.encode()
            if meta is None or told.state == stored.state or apart:
                if told.state == states.SUCCESS:
                    told = replace(told, result=stored.result)
                return Known(task_id, count, replace(told, record=noted))
        elif meta is None:
            published = noted.published if noted else None
            stored = replace(stored, id=0, time=published)
        return Known(task_id, count, replace(stored, record=noted))

    def _read_record(self, task_id: str, text: bytes) -> Record | None:
        try:
            return Record.read(text)
        except _UNREADABLE:
            logger.exception("the record of task %s cannot be read", task_id)
            return None

    def read_event(self, task_id: str, number: int, text: bytes) -> Status | Event | None:
        """None for one that cannot be read: it is logged, and keeps nobody from the others."""
        try:
            found = json.loads(text)
            if "event" in found:
                return Event(task_id, number, found["event"], found.get("data"), found.get("time"))
            # Other versions may tell more.
            told = {name: found[name] for name in _TOLD if name in found}
            return Status(task_id, id=number, **told)
        except _UNREADABLE:
            logger.exception("event %d of task %s cannot be read: %.200r", number, task_id, text)
            return None

    def decode(self, task_id: str, payload: bytes | None) -> Status:
        try:
            meta = self._app.backend.decode(payload) if payload is not None else None
            return Status.from_meta(task_id, meta)
        except Exception as error:  # a serializer that this app does not accept, or no result
            logger.exception("the stored state of task %s cannot be read", task_id)
            told = events.error_of(error)
            return Status(
                task_id, states.FAILURE, error=f"unreadable: {told['error']}", code="unreadable"
            )

    def read_blocking(self, task_id: str) -> Status | None:
        """Of a task, where events cannot be listened to."""
        backend, book = self._app.backend, records.book_of(self._app)
        if isinstance(book, records.Slip):
            meta, noted = backend.get(backend.get_key_for_task(task_id)), book.read(task_id)
            if meta is None and noted is None:
                return None
            return replace(self.decode(task_id, meta), record=noted)
        if not hasattr(backend, "prefix"):
            return Status.from_meta(task_id, backend.get_task_meta(task_id, cache=False))
        client: redis.Redis = backend.client
        record = execute(client, "HGETALL", records.key_of(backend.prefix, task_id))
        stored: Any = client.get(store.task_key(self._app, task_id))
        return self.known(task_id, record, stored).status
