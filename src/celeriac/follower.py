"""Who follows a task: the events on their way to one reader, of whom no more than so many wait."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from celeriac.state import Event, Status

BUFFER = 256  # events kept for a follower that does not read


class Follower:
    """Of one task; an iterator of its events, to the terminal one.

    It listens once it has read what there was; when its buffer is full it stops to, and reads on
    from its last number when the buffer is empty.
    """

    def __init__(self, ask: Callable[["Follower"], None], after: int | None) -> None:
        self._ask = ask
        self._events: deque[Status | Event] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._ended = False
        self._state: Status | None = None  # the last one taken in
        self.last = after  # the number of the last one taken in; None before the first read
        self.listening = False
        self.asks = False

    def put(self, event: Status | Event) -> bool:
        """Take it in, unless there is no room."""
        if len(self._events) >= BUFFER:
            self.listening = False
            return False
        if event.id is not None:
            self.last = event.id
        if isinstance(event, Status):
            self._state = event
        self._events.append(event)
        self._arrived.set()
        return True

    def differs(self, status: Status) -> bool:
        """Whether a state that Celery stored is another one than that of the last event."""
        last = self._state
        if last is None or last.state != status.state:
            return True
        return last.error is None and last.as_json().get("result") != status.as_json().get("result")

    def end(self, error: Exception | None = None) -> None:
        self._ended, self._error = True, error
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Status | Event]:
        while True:
            while self._events:
                event = self._events.popleft()
                last = not self._events and (self.listening or event.id is None)
                yield event
                if event.terminal and last and not self._events:
                    return
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            if not self.listening and not self.asks:
                self._ask(self)
            await self._arrived.wait()
            self._arrived.clear()
