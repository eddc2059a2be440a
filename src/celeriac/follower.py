"""Who follows a task: the events on their way to one reader, of whom no more than so many wait."""

import asyncio
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
        # No deque and no asyncio.Event, which holds one: each takes 0.7 KB from the start, and
        # there are thousands of followers to whom nothing happens.
        self._events: list[Status | Event] = []
        self._waiter: asyncio.Future[None] | None = None
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
        self._wake()
        return True

    def differs(self, status: Status) -> bool:
        """Whether a state that Celery stored is another one than that of the last event."""
        last = self._state
        if last is None or last.state != status.state:
            return True
        return last.error is None and last.as_json().get("result") != status.as_json().get("result")

    def end(self, error: Exception | None = None) -> None:
        self._ended, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Status | Event]:
        while True:
            while self._events:
                event = self._events.pop(0)
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
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
