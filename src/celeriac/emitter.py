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
from contextvars import Context
from typing import Any
from uuid import uuid4

from celery import Task, states

from celeriac import bridge, events

logger = logging.getLogger(__name__)

PROGRESS = "PROGRESS"
_STORED_AT_ONCE = states.READY_STATES | {states.RETRY}
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
        self._state: tuple[str, Any] | None = None  # the last one that waits
        self._sent = 0
        self._sending = False
        self._lock = threading.Lock()
        self._loop = bridge.loop()
        self._sender: asyncio.Task[None] | None = None

    def progress(self, value: dict[str, Any]) -> None:
        text = events.of_state(PROGRESS, value)
        with self._lock:
            if self._state is not None:
                self._waiting = deque(each for each in self._waiting if each[0] != PROGRESS)
            self._state = PROGRESS, value
            self._take_in(PROGRESS, text)

    def takes(self, state: str) -> bool:
        """Whether a state has to wait here behind what was told before.

        In code that the loop runs by itself, as an asyncio task of the body's: it cannot wait for
        what the loop sends.
        """
        return self._sending and self._on_loop() and state not in _STORED_AT_ONCE

    def state(self, state: str, value: Any, text: str) -> None:
        with self._lock:
            self._state = state, value
            self._take_in("state", text)

    def _on_loop(self) -> bool:
        return asyncio._get_running_loop() is self._loop and not bridge.hosted()

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
            # In no context: the body's would make it one of those that end with the body.
            self._loop.call_soon_threadsafe(self._start, context=Context())

    def _start(self) -> None:
        self._sender = self._loop.create_task(self._send(), name="celeriac-emit")

    async def _send(self) -> None:
        while True:
            with self._lock:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_ONCE))]
                if not batch:
                    self._sending = False
                    return
                value: Any = ""
                if self._state is not None and any(kind != "event" for kind, _ in batch):
                    value, self._state = self._stored(*self._state), None
            counts = await self._tell(batch, value)
            self._sent += len(batch)
            if not counts:  # a later run does
                with self._lock:
                    self._waiting.clear()

    async def _tell(self, batch: list[tuple[str, str]], value: Any) -> bool:
        backend, task_id = self._backend, self._request.id
        try:
            counts: bool = await backend.emit(
                task_id, self._run, self._token, self._sent + 1, batch, value
            )
        except Exception:  # the task is worth more than what it tells
            logger.exception("%d events of task %s are lost", len(batch), task_id)
            return True
        return counts

    def _stored(self, state: str, value: Any) -> Any:
        """As Celery stores a state, for those who ask Celery."""
        meta = self._backend._get_result_meta(
            result=value, state=state, traceback=None, request=self._request
        )
        return self._backend.encode(meta | {"task_id": self._request.id})

    async def _wait(self) -> None:
        while self._sending:
            if self._sender is None or self._sender.done():
                await asyncio.sleep(0)  # it is about to start
            else:
                await asyncio.wait([self._sender])

    def drain(self) -> None:
        """Wait until all is sent, where that does not stop the loop that sends it."""
        if self._sending and not self._on_loop():
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
