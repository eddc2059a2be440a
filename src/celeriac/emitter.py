"""What a task tells while it runs, on its way to those who follow it.

`emit` and `progress` take a few microseconds: what they take in is sent by the process's event
loop, many at once, and of several progresses only the last. The end of the task waits until all of
it is sent.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Coroutine, Generator
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

from celery import Task

from celeriac import bridge, events

logger = logging.getLogger(__name__)

PROGRESS = "PROGRESS"
_AT_ONCE = 100
_ROOM = 1000  # events that wait before who tells more has to
_MOST = 10_000  # of one that does not


class Emitter:
    """Of one run of a task; made when it tells something."""

    def __init__(self, task: Task) -> None:
        self._task, self._request, self._backend = task, task.request, task.app.backend
        self._run = getattr(self._request, "celeriac_run", None)
        self._token = self._run.token if self._run else uuid4().hex
        self._waiting: deque[tuple[str, str]] = deque()  # kind and text
        self._progress: dict[str, Any] | None = None  # the last one that waits
        self._sent = 0
        self._sending = False
        self._lock = threading.Lock()
        self._loop = bridge.loop()
        self._sender: asyncio.Task[None] | None = None

    def progress(self, value: dict[str, Any]) -> None:
        text = events.of_state(PROGRESS, value)
        with self._lock:
            if self._progress is not None:
                self._waiting = deque(each for each in self._waiting if each[0] != "state")
            self._progress = value
            self._take_in("state", text)

    def emit(self, event: str, data: Any) -> None:
        text = events.of_own(event, data)
        if len(self._waiting) >= _ROOM and asyncio._get_running_loop() is None:
            self.drain()
        with self._lock:
            if len(self._waiting) >= _MOST:
                raise RuntimeError(f"{_MOST} events wait to be sent: await self.emit(…)")
            self._take_in("event", text)

    def _take_in(self, kind: str, text: str) -> None:
        self._waiting.append((kind, text))
        if not self._sending:
            self._sending = True
            self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._sender = self._loop.create_task(self._send(), name="celeriac-emit")

    async def _send(self) -> None:
        while True:
            with self._lock:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_ONCE))]
                if not batch:
                    self._sending = False
                    return
                value = ""
                if self._progress is not None and any(kind == "state" for kind, _ in batch):
                    value, self._progress = self._stored(self._progress), None
            counts = await self._tell(batch, value)
            self._sent += len(batch)
            if not counts:  # a later run does
                with self._lock:
                    self._waiting.clear()

    async def _tell(self, batch: list[tuple[str, str]], value: str) -> bool:
        backend, task_id = self._backend, self._request.id
        try:
            counts: bool = await backend.emit(
                task_id, self._run, self._token, self._sent + 1, batch, value
            )
        except Exception:  # the task is worth more than what it tells
            logger.exception("%d events of task %s are lost", len(batch), task_id)
            return True
        return counts

    def _stored(self, progress: dict[str, Any]) -> str:
        """As Celery stores a state, for those who ask Celery."""
        meta = self._backend._get_result_meta(
            result=progress, state=PROGRESS, traceback=None, request=self._request
        )
        text: str = self._backend.encode(meta | {"task_id": self._request.id})
        return text

    async def _wait(self) -> None:
        while self._sending:
            if self._sender is None or self._sender.done():
                await asyncio.sleep(0)  # it is about to start
            else:
                await asyncio.wait([self._sender])

    def drain(self) -> None:
        """Wait until all is sent."""
        if self._sending:
            sent = asyncio.run_coroutine_threadsafe(self._wait(), self._loop)
            if bridge.hosted():
                bridge.run(_end_of(sent))
            else:
                sent.result()

    def wait_for_room(self) -> Coroutine[Any, Any, None]:
        return _end_of(asyncio.run_coroutine_threadsafe(self._wait(), self._loop))

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= _ROOM


async def _end_of(sent: "Future[None]") -> None:
    await asyncio.wrap_future(sent)


class Room:
    """Awaited, it waits until there is room for more."""

    __slots__ = ("_emitter",)

    def __init__(self, emitter: Emitter | None) -> None:
        self._emitter = emitter

    def __await__(self) -> Generator[Any, None, None]:
        if self._emitter is not None and self._emitter.is_full:
            yield from self._emitter.wait_for_room().__await__()


def of(task: Task) -> Emitter | None:
    """That of the run of `task` here; None where nobody could follow it."""
    request = task.request
    found: Emitter | None = request.__dict__.get("celeriac_emitter")
    if found is None and request.id is not None and hasattr(task.app.backend, "emit"):
        found = request.celeriac_emitter = Emitter(task)
    return found
