"""The end of tasks that nobody has begun in time: there may be no worker to say so.

A worker without the library does not store what it has begun, so workers are asked first.
"""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol

from celery import Celery, states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from celeriac.state import Status

logger = logging.getLogger(__name__)

_GRACE = 1.0  # seconds for a worker to say that a task has expired
_ANSWER = 1.0  # seconds for workers to say what they run
_AGAIN = 10.0  # seconds until they are asked again of what they did run


class Chores(Protocol):
    """How the owner keeps asyncio tasks; one that `asks` has a thread, and is not cancelled."""

    def __call__(
        self, chore: Coroutine[Any, Any, Any], *, asks: bool = False
    ) -> asyncio.Task[Any]: ...


class Expiry:
    """Of one app's tasks, as long as somebody looks at them."""

    def __init__(self, app: Celery, do: Chores) -> None:
        self._app, self._do = app, do
        self._due: dict[str, float] = {}  # those that are followed, and when to look at them
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._overdue: set[str] = set()
        self._ending: asyncio.Task[None] | None = None
        self._active: dict[str, float] = {}  # those that run, until they are asked for again

    def watch(self, status: Status) -> None:
        """End a task when it expires, until `leave`."""
        if (due := _due(status)) < math.inf and status.task_id not in self._due:
            self._due[status.task_id] = due
            self._changed.set()
            if self._watching is None or self._watching.done():
                self._watching = self._do(self._watch())

    def leave(self, task_id: str) -> None:
        if self._due.pop(task_id, None) is not None:
            self._changed.set()

    def clear(self) -> None:
        """Nobody follows any more; the owner ends the chores."""
        self._due.clear()
        self._watching = None

    async def end(self, status: Status) -> bool:
        """End a task that has expired, unless a worker runs it; whether this was tried."""
        return time.time() > _due(status) and await self._end(status.task_id)

    async def _watch(self) -> None:
        while self._due:
            self._changed.clear()
            task_id, due = min(self._due.items(), key=lambda each: each[1])
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.time())):
                    await self._changed.wait()
                continue
            self._due[task_id] = time.time() + _AGAIN + _ANSWER
            self._do(self._end(task_id))

    async def _end(self, task_id: str) -> bool:
        now = asyncio.get_running_loop().time()
        self._active = {each: until for each, until in self._active.items() if until > now}
        if task_id in self._active or not hasattr(self._app.backend, "cancel"):
            return False
        self._overdue.add(task_id)  # of many at once workers are asked once
        if self._ending is None or self._ending.done():
            self._ending = self._do(self._end_overdue(), asks=True)
        await asyncio.wait([self._ending])
        return True

    async def _end_overdue(self) -> None:
        backend = self._app.backend  # of this thread: Celery makes one for each
        while self._overdue:
            overdue, self._overdue = self._overdue, set()
            active = await asyncio.to_thread(self._end_others, backend, overdue)
            until = asyncio.get_running_loop().time() + _AGAIN
            self._active |= dict.fromkeys(active, until)

    def _end_others(self, backend: Any, task_ids: set[str]) -> set[str]:
        """End those that no worker runs; gives the rest."""
        try:
            answers = self._app.control.inspect(timeout=_ANSWER).query_task(*task_ids) or {}
            active = {
                task_id
                for each in answers.values()
                for task_id, (state, _) in each.items()
                if state == "active"
            }
            for task_id in task_ids - active:
                backend.cancel(task_id, "expired", expired=True)
        except (RedisError, OSError, OperationalError) as error:
            logger.warning("whether tasks that have expired run is not known: %s", error)
            return task_ids
        return active


def _due(status: Status) -> float:
    """When a task that waits has expired, in seconds since 1970; of others never."""
    expires = status.record.expires if status.record else None
    if status.state != states.PENDING or expires is None:
        return math.inf
    return expires + _GRACE
