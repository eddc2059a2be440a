"""What an application's requests read of its tasks, over the process's event loop.

All threads share one connection to the status store. A stream costs its server a thread.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Hashable
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack, aclosing
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from celery import Celery

from celeriac import bridge
from celeriac.app import watching_runs
from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.registry import Registry
from celeriac.status import Event, Reader, Status, reader_of
from celeriac.web import telling

logger = logging.getLogger(__name__)
T = TypeVar("T")

_QUIET = 15.0  # seconds after which a stream says that it is still there


class _Kept:
    """An app's reader, with its connection, for as long as the loop runs."""

    def __init__(self, celery: Celery) -> None:
        self.reader = reader_of(celery)
        self._celery = celery
        self._open = AsyncExitStack()
        self._opening: asyncio.Task[None] | None = None

    async def opened(self) -> Reader:
        if self._opening is None:
            # In an empty context, not the first request's.
            self._opening = asyncio.create_task(
                self._begin(), name="celeriac-flask-open", context=Context()
            )
        await asyncio.shield(self._opening)
        return self.reader

    async def _begin(self) -> None:
        await self._open.enter_async_context(self.reader)
        watching = watching_runs(self._celery)
        await asyncio.to_thread(watching.__enter__)
        self._open.push(watching.__exit__)  # not in a thread: at a process's end there are none

    async def aclose(self) -> None:
        if self._opening is not None:
            await asyncio.wait([self._opening])
        await self._open.aclose()


_kept: Registry[_Kept] = Registry()


class Reads:
    """Of one application."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lock = threading.Lock()
        self._open = Counter[Hashable]()
        self._waits: set[Future[Any]] = set()
        self._stopped = False

    def call(self, ask: Callable[[Reader], Coroutine[Any, Any, T]]) -> T:
        """What `ask` gives, which runs on the process's loop."""
        return bridge.run(self._ask(ask))

    async def _ask(self, ask: Callable[[Reader], Coroutine[Any, Any, T]]) -> T:
        kept = await _kept.get(self._celery, partial(_Kept, self._celery))
        return await ask(await kept.opened())

    def stop(self) -> None:
        """End what waits, since the server is about to: it waits for all its threads."""
        with self._lock:
            self._stopped = True
            waits = tuple(self._waits)
        for each in waits:
            each.cancel()

    def count(self, who: Hashable, most: int) -> Callable[[], None] | None:
        """Count one of theirs until what this gives is called; None if there are too many."""
        with self._lock:
            if self._open[who] >= most:
                return None
            self._open[who] += 1
        return partial(self._uncount, who)

    def _uncount(self, who: Hashable) -> None:
        with self._lock:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]

    def wait(self, ask: Callable[[Reader], Coroutine[Any, Any, T]]) -> T | None:
        """What `ask` gives after some time; None if the server is about to stop before."""
        begun = asyncio.run_coroutine_threadsafe(self._ask(ask), bridge.loop())
        self._wait_for(begun)
        return None if begun.cancelled() else begun.result()

    def _wait_for(self, begun: Future[Any], seconds: float | None = None) -> bool:
        """Whether it has ended, or been cancelled because the server stops."""
        with self._lock:
            self._waits.add(begun)
            stopped = self._stopped
        if stopped:
            begun.cancel()
        try:
            wait([begun], seconds)
        finally:
            with self._lock:
                self._waits.discard(begun)
        return begun.done()

    def told(self, task_id: str, after: int | None) -> Generator[Status | Event | None]:
        """What happens to a task; None when nothing did for a while."""
        if self._stopped:
            return
        loop = bridge.loop()
        taken: Future[Any] = Future()
        queue: asyncio.Queue[Status | Event | None] = asyncio.Queue(1)

        async def put(reader: Reader) -> None:
            async with aclosing(telling.told(reader, task_id, after)) as events:
                async for event in events:
                    await queue.put(event)

        async def put_all() -> None:
            try:
                await self._ask(put)
            except (UnknownTaskError, ServiceError):
                pass  # any more: the client asks again
            except Exception:
                logger.exception("what happens to task %s is not told any more", task_id)
            await queue.put(None)

        putting = asyncio.run_coroutine_threadsafe(put_all(), loop)
        try:
            while True:
                taken = asyncio.run_coroutine_threadsafe(queue.get(), loop)
                while not self._wait_for(taken, _QUIET):
                    yield None
                if taken.cancelled() or (event := taken.result()) is None:
                    return
                yield event
        finally:
            taken.cancel()
            putting.cancel()
