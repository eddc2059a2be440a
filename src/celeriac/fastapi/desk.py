"""What the routes of one `status_router` have in common."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Hashable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from weakref import ref

from celery import Celery
from fastapi import HTTPException, WebSocketException, status
from starlette.requests import HTTPConnection

from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.fastapi.origins import same_origin
from celeriac.fastapi.owners import PUBLIC, Access, Owner, ReadTokens, checked
from celeriac.fastapi.stopping import Stopping
from celeriac.fastapi.views import visible
from celeriac.status import HINT_AFTER, Event, Reader, Status, reader_of

_FIRST_EVENT = 5.0  # seconds; a status store that is silent for longer is away


class Desk:
    """Who may see what, how much of it at once, and what is told."""

    def __init__(
        self,
        celery: Celery,
        *,
        origins: Collection[str],
        unowned: bool,
        errors: bool,
        tokens: ReadTokens | None,
        streams: int,
    ) -> None:
        # FastAPI keeps views, and what they close over, for ever; the app shall not live as long.
        self._celery = ref(celery)
        self._origins, self._unowned, self._tokens = origins, unowned, tokens
        self.errors = errors  # whether the messages of all are shown
        self._most, self._streams = streams, Counter[Hashable]()
        self.stopping = Stopping()

    @property
    def celery(self) -> Celery:
        celery = self._celery()
        assert celery is not None
        return celery

    @property
    def reader(self) -> Reader:
        return reader_of(self.celery)

    def access(self, owner: Owner, token: str | None = None) -> Access:
        """What a token says is all that counts of who has one: a cookie adds nothing to it."""
        if token is not None and self._tokens is not None:
            return self._tokens.access(token) or Access()
        return Access(checked(owner), unowned=self._unowned)

    async def find(self, task_id: str, access: Access) -> Status:
        """The state of a task. 404 where it may not be seen, whatever the reason."""
        return await visible(
            self.reader, task_id, lambda found: access.allows(found.task_id, found.record)
        )

    def check_origin(self, connection: HTTPConnection, access: Access) -> None:
        # A token is nothing that a browser sends by itself.
        if not access.by_token and not same_origin(connection.headers, self._origins):
            raise WebSocketException(status.WS_1008_POLICY_VIOLATION)

    @contextmanager
    def stream(self, connection: HTTPConnection, access: Access) -> Iterator[None]:
        """Count an open stream. Raises 429 where there are too many of the same one's."""
        who: Hashable = access
        if access.owner in ("", PUBLIC) and not access.by_token:
            who = connection.client and connection.client.host
        if self._streams[who] >= self._most:
            raise HTTPException(
                status.HTTP_429_TOO_MANY_REQUESTS, f"{self._most} streams are open: close some"
            )
        self._streams[who] += 1
        try:
            yield
        finally:
            self._streams[who] -= 1
            if not self._streams[who]:
                del self._streams[who]

    async def wait(self, task: Status, seconds: float, seen: Collection[str]) -> Status:
        """The state once it is none of those `seen`, or the last; the present one in the end."""
        current = task
        with suppress(TimeoutError, UnknownTaskError):
            async with self.stopping.within(seconds), aclosing(self.told(task.task_id)) as events:
                async for event in events:
                    if isinstance(event, Status):
                        current = await self.reader.with_hint(replace(event, record=task.record))
                        if current.terminal or (seen and not matches(current, seen)):
                            break
        return current

    async def told_until_stopped(
        self, task_id: str, after: int | None
    ) -> AsyncGenerator[Status | Event]:
        """`told`, which ends when the server is about to stop."""
        async with aclosing(self.told(task_id, after)) as events:
            with suppress(TimeoutError):
                while True:
                    async with self.stopping.within():
                        event = await anext(events, None)
                    if event is None:
                        return
                    yield event

    async def told(self, task_id: str, after: int | None = None) -> AsyncGenerator[Status | Event]:
        """What happens to a task; and once, if nothing does and it is PENDING, why.

        Raises UnknownTaskError, and ServiceError if the status store does not begin to tell.
        """
        async with self.reader.follow(task_id, after) as events:
            pending = True
            if after is None:  # else there may be nothing to tell for long
                try:
                    async with asyncio.timeout(_FIRST_EVENT):
                        first = await anext(events, None)
                except TimeoutError:
                    raise ServiceError("the status store does not tell") from None
                if first is not None:
                    yield first
                pending = first is not None and first.state == "PENDING"
            if pending:
                upcoming = asyncio.create_task(_next_of(events), name="celeriac-upcoming")
                try:
                    ended, _ = await asyncio.wait([upcoming], timeout=HINT_AFTER)
                    hint = None if ended else await self._hint(task_id)
                    if hint is not None and not upcoming.done():
                        yield hint
                    event = await upcoming
                finally:
                    upcoming.cancel()
                    await asyncio.gather(upcoming, return_exceptions=True)
                if event is not None:
                    yield event
            async for event in events:
                yield event

    async def _hint(self, task_id: str) -> Status | None:
        with suppress(ServiceError, UnknownTaskError):
            found = await self.reader.with_hint(await self.reader.snapshot(task_id))
            if found.waiting is not None:
                return found
        return None


def tag_of(task: Status) -> str:
    if task.id is not None:
        return f'"{task.id}-waiting"' if task.waiting else f'"{task.id}"'
    text = repr((task.state, task.result, task.error, task.waiting)).encode()
    return f'"{hashlib.sha256(text).hexdigest()[:16]}"'


def tags_in(header: str | None) -> set[str]:
    """Of an If-None-Match, which compares weakly: a proxy that compresses says W/ of ours."""
    return {tag.strip().removeprefix("W/") for tag in (header or "").split(",")} - {""}


def matches(task: Status, tags: Collection[str]) -> bool:
    return tag_of(task) in tags or "*" in tags


async def _next_of(events: AsyncIterator[Status | Event]) -> Status | Event | None:
    return await anext(events, None)
