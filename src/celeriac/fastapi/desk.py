"""What the routes of one `status_router` have in common."""

from collections import Counter
from collections.abc import AsyncGenerator, Collection, Hashable, Iterator
from contextlib import aclosing, contextmanager, suppress
from weakref import ref

from celery import Celery
from fastapi import HTTPException, WebSocketException, status
from starlette.requests import HTTPConnection

from celeriac.fastapi.owners import checked
from celeriac.fastapi.stopping import Stopping
from celeriac.fastapi.views import visible
from celeriac.status import Event, Reader, Status, reader_of
from celeriac.web import telling
from celeriac.web.origins import same_origin
from celeriac.web.owners import PUBLIC, Access, Owner, ReadTokens
from celeriac.web.shown import too_many


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
            raise HTTPException(status.HTTP_429_TOO_MANY_REQUESTS, too_many(self._most))
        self._streams[who] += 1
        try:
            yield
        finally:
            self._streams[who] -= 1
            if not self._streams[who]:
                del self._streams[who]

    async def wait(self, task: Status, seconds: float, seen: Collection[str]) -> Status:
        return await telling.wait(self.reader, task, self.stopping.within(seconds), seen)

    def told(self, task_id: str, after: int | None = None) -> AsyncGenerator[Status | Event]:
        return telling.told(self.reader, task_id, after)

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
