"""A server that is about to stop waits for every answer to end: those that need not, end then.

A lifespan's end comes after that wait. uvicorn closes its WebSockets by itself.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

_LOOK = 0.1  # seconds, as uvicorn's own


class Stopping:
    """Of one application: `within` is over when its server begins to stop."""

    def __init__(self) -> None:
        self._waits: set[asyncio.Timeout] = set()
        self._stopping = False

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look whether the server stops, where it is uvicorn: others limit their wait."""
        self._stopping = False
        # Its handler is a method of the server; who has put another one before it is not watched.
        server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        watching = asyncio.create_task(self._watch(server), name="celeriac-stopping")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch(self, server: Any) -> None:
        if not hasattr(server, "should_exit"):
            return
        while not server.should_exit:  # noqa: ASYNC110 - it has no event for it
            await asyncio.sleep(_LOOK)
        self._stopping = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0)

    @asynccontextmanager
    async def within(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Raise TimeoutError inside after so long, or when the server stops."""
        async with asyncio.timeout(0 if self._stopping else seconds) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)
