"""The routes of the status of tasks."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from weakref import ref

from celery import Celery
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Query,
    Response,
    WebSocket,
    WebSocketException,
    status,
)  # fmt: skip
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.websockets import WebSocketDisconnect

from celeriac import dead
from celeriac.app import watching_runs
from celeriac.errors import DeadLetterError, ServiceError, UnknownTaskError
from celeriac.fastapi.origins import same_origin
from celeriac.fastapi.owners import PUBLIC, OwnerPolicy, ReadTokens, may_see
from celeriac.fastapi.views import (
    UNKNOWN,
    TaskId,
    TaskList,
    TaskStatus,
    described,
    shown,
    visible,
)  # fmt: skip
from celeriac.race import until_first
from celeriac.status import HINT_AFTER, Event, Reader, Status, drop_reader, reader_of

_FIRST_FRAME = 5.0  # seconds; a status store that is silent for longer is away
_LONGEST_WAIT = 60.0  # seconds of a long poll
_TRY_AGAIN_LATER = 1013
_NOT_FOUND, _TOO_MANY = 4404, 4429  # of WebSockets, after HTTP's
_TASKS_OF_A_SOCKET = 100
_STATIC = Path(__file__).parent / "static"


def status_router(
    celery: Celery,
    *,
    owner: OwnerPolicy,
    origins: Collection[str] = (),
    unowned: bool = False,
    errors: bool = False,
    tokens: ReadTokens | None = None,
    streams: int = 100,
) -> APIRouter:
    """Everything about tasks over HTTP, SSE and WebSocket: see docs/howto/status.md.

    `owner` is the policy that says whose tasks a connection may see, such as `public`; of any
    other's it is told, byte for byte, what is told of an unknown one. Pages of other sites are
    refused a WebSocket, except those of `origins`. With `unowned` a task that is nobody's, such as
    one that was sent from a shell, is shown to whoever knows its id. With `errors` the messages of
    all errors are shown, not only those that were written for the public. `tokens` lets in who has
    one of them. One owner may have so many `streams` open in one process.
    """
    desk = _Desk(celery, unowned, errors, tokens, streams)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = watching_runs(celery)
        await asyncio.to_thread(watching.__enter__)
        try:
            async with reader_of(celery):  # kept open between requests, closed with the application
                yield
        finally:
            drop_reader(celery)
            await asyncio.to_thread(watching.__exit__, None, None, None)

    router = APIRouter(lifespan=lifespan, tags=["tasks"])
    Owner = Annotated[str, Depends(owner)]  # noqa: N806
    Token = Annotated[str | None, Query(max_length=1000)]  # noqa: N806
    After = Annotated[int | None, Query(ge=0, le=2**53)]  # noqa: N806
    not_found: dict[int | str, Any] = {404: {"description": "Unknown, or not yours"}}
    options: Any = {"responses": not_found, "response_model_exclude_none": True}

    async def found(task_id: TaskId, who: Owner, token: Token = None) -> Status:
        return await desk.find(task_id, who, token)

    Found = Annotated[Status, Depends(found)]  # noqa: N806

    @router.get("/tasks/{task_id}", **options)
    async def get_task(
        task: Found,
        response: Response,
        wait: Annotated[float, Query(ge=0, le=_LONGEST_WAIT)] = 0,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> TaskStatus:
        """The state now. With `wait`, in seconds: the one after `If-None-Match`, or the last."""
        if wait:
            task = await desk.wait(task, wait, if_none_match)
        response.headers["ETag"] = tag = _tag(task)
        response.headers["Cache-Control"] = "no-cache"
        if tag == if_none_match:
            raise HTTPException(status.HTTP_304_NOT_MODIFIED, headers={"ETag": tag})
        return described(await desk.reader.with_hint(task), errors=errors)

    @router.get("/tasks", response_model_exclude_none=True)
    async def list_tasks(
        who: Owner,
        before: Annotated[str | None, Query(pattern=r"^\d{1,20}-\d{1,20}$")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> TaskList:
        """The owner's recent tasks, the newest first."""
        if who == PUBLIC:
            return TaskList(tasks=[])  # nobody's are listed
        found, following = await desk.reader.recent(who, limit, before)
        return TaskList(tasks=[described(each, errors=errors) for each in found], next=following)

    @router.delete("/tasks/{task_id}", status_code=status.HTTP_202_ACCEPTED, **options)
    async def cancel_task(task: Found) -> TaskStatus:
        """Cancel: what waits never starts, what runs is told to stop."""
        return described(await desk.reader.cancel(task.task_id), errors=errors)

    refused: Any = {409: {"description": "It is no dead letter"}}

    @router.post(
        "/tasks/{task_id}/retry",
        status_code=status.HTTP_202_ACCEPTED,
        response_model_exclude_none=True,
        responses=not_found | refused,
    )
    async def retry_task(task: Found) -> TaskStatus:
        """Send a dead letter again, as a new task."""
        try:
            task_id = await asyncio.to_thread(dead.send_anew, desk.celery, task.task_id)
        except DeadLetterError as error:
            raise HTTPException(status.HTTP_409_CONFLICT, "it is no dead letter") from error
        return described(await desk.reader.snapshot(task_id), errors=errors)

    async def resumed(
        task: Found,
        who: Owner,
        after: After = None,
        last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
    ) -> AsyncIterator[int | None]:
        after = last_event_id if last_event_id is not None else after
        if task.terminal and task.id is not None and after is not None and after >= task.id:
            raise HTTPException(status.HTTP_204_NO_CONTENT)  # which ends an EventSource for good
        with desk.stream(who):
            yield after

    @router.get("/tasks/{task_id}/events", response_class=EventSourceResponse, responses=not_found)
    async def task_events(
        task: Found, after: Annotated[int | None, Depends(resumed)]
    ) -> AsyncIterator[ServerSentEvent]:
        """What happens from now on, or after `Last-Event-ID`, to the end, as server-sent events."""
        with suppress(UnknownTaskError):  # any more: the status store has lost it
            async with desk.reader.follow(task.task_id, after) as events:
                async for event in events:
                    data = shown(event, errors=errors)
                    number = None if event.id is None else str(event.id)
                    yield ServerSentEvent(data=data, id=number)

    @router.websocket("/ws/task_status/{task_id}")
    async def task_socket(
        websocket: WebSocket, task_id: TaskId, who: Owner, after: After = None, token: Token = None
    ) -> None:
        desk.check_origin(websocket, origins, token)
        await websocket.accept()
        try:
            with desk.stream(who):
                await desk.find(task_id, who, token)
                async with desk.reader.follow(task_id, after) as events:
                    await _race(websocket, desk.send_all(websocket, events))
        except HTTPException as error:
            await _close(websocket, _close_code(error.status_code), str(error.detail))
        except ServiceError:
            await _close(websocket, _TRY_AGAIN_LATER, "the status store is away")

    @router.websocket("/ws/tasks")
    async def tasks_socket(websocket: WebSocket, who: Owner, token: Token = None) -> None:
        desk.check_origin(websocket, origins, token)
        await websocket.accept()
        try:
            with desk.stream(who):
                await _Many(desk, websocket, who, token).serve()
        except HTTPException as error:
            await _close(websocket, _close_code(error.status_code), str(error.detail))

    @router.get("/celeriac/client.js", include_in_schema=False)
    async def client() -> FileResponse:
        """The browser's side of all this, an ES module."""
        return FileResponse(_STATIC / "client.js", media_type="text/javascript")

    return router


class _Desk:
    """What the routes of one router have in common."""

    def __init__(
        self, celery: Celery, unowned: bool, errors: bool, tokens: ReadTokens | None, streams: int
    ) -> None:
        # FastAPI keeps views, and what they close over, for ever; the app shall not live as long.
        self._celery = ref(celery)
        self._unowned, self._errors, self._tokens = unowned, errors, tokens
        self._most, self._streams = streams, Counter[str]()

    @property
    def celery(self) -> Celery:
        celery = self._celery()
        assert celery is not None
        return celery

    @property
    def reader(self) -> Reader:
        return reader_of(self.celery)

    async def find(self, task_id: str, who: str, token: str | None) -> Status:
        """The state of a task that `who`, or the token, may see. Else 404, whatever the reason."""

        def allows(found: Status) -> bool:
            if may_see(who, found.record, unowned=self._unowned):
                return True
            if token is None or self._tokens is None:
                return False
            return self._tokens.allows(token, found.task_id, found.record)

        return await visible(self.reader, task_id, allows)

    def check_origin(
        self, websocket: WebSocket, origins: Collection[str], token: str | None
    ) -> None:
        by_token = self._tokens is not None and token is not None  # which no browser sends itself
        if not by_token and not same_origin(websocket.headers, origins):
            raise WebSocketException(status.WS_1008_POLICY_VIOLATION)

    @contextmanager
    def stream(self, who: str) -> Iterator[None]:
        """Count an open stream. Raises 429 where the owner has too many."""
        if who == PUBLIC:
            yield
            return
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

    async def wait(self, task: Status, seconds: float, seen: str | None) -> Status:
        """The state once it is another one than `seen`, or the last; the present one in the end."""
        current = task
        with suppress(TimeoutError, UnknownTaskError):
            async with asyncio.timeout(seconds), self.reader.follow(task.task_id) as events:
                async for event in events:
                    if isinstance(event, Status):
                        current = replace(event, record=task.record)
                        if current.terminal or (seen is not None and _tag(current) != seen):
                            break
        return current

    async def send_all(self, websocket: WebSocket, events: AsyncIterator[Status | Event]) -> None:
        try:
            async with asyncio.timeout(_FIRST_FRAME):
                first = await anext(events, None)
            if first is not None:
                await websocket.send_json(shown(first, errors=self._errors))
                hint = asyncio.create_task(self._hint(websocket, first), name="celeriac-hint")
                try:
                    async for event in events:
                        hint.cancel()
                        await websocket.send_json(shown(event, errors=self._errors))
                finally:
                    hint.cancel()
        except TimeoutError:
            await websocket.close(_TRY_AGAIN_LATER, "the status store is away")
        except UnknownTaskError:
            await websocket.close(_NOT_FOUND, UNKNOWN)
        else:
            await websocket.close()

    async def _hint(self, websocket: WebSocket, first: Status | Event) -> None:
        """Say once more that a task is PENDING, should there be a reason."""
        if first.state == "PENDING":
            with suppress(ServiceError, UnknownTaskError, WebSocketDisconnect, RuntimeError):
                await asyncio.sleep(HINT_AFTER)
                status = await self.reader.with_hint(await self.reader.snapshot(first.task_id))
                if status.waiting is not None:
                    await websocket.send_json(shown(status, errors=self._errors))

    async def forward(
        self, websocket: WebSocket, task_id: str, who: str, token: str | None, after: int | None
    ) -> None:
        """Over a socket of several tasks, which may be gone meanwhile."""
        with suppress(WebSocketDisconnect, RuntimeError):
            try:
                await self.find(task_id, who, token)
                async with self.reader.follow(task_id, after) as events:
                    async for event in events:
                        await websocket.send_json(shown(event, errors=self._errors))
            except (HTTPException, UnknownTaskError):
                await websocket.send_json({"task_id": task_id, "error": UNKNOWN, "code": "unknown"})
            except ServiceError:
                away = {"error": "the status store is away", "code": "away"}
                await websocket.send_json({"task_id": task_id} | away)


class _Many:
    """A WebSocket on which a client says which tasks it follows: `{"follow": id, "after": n}`."""

    def __init__(self, desk: _Desk, websocket: WebSocket, who: str, token: str | None) -> None:
        self._desk, self._websocket, self._who, self._token = desk, websocket, who, token
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        try:
            while True:
                with suppress(ValueError):  # no JSON: told below
                    message = await self._websocket.receive_json()
                    if self._obey(message):
                        continue
                await _close(self._websocket, status.WS_1008_POLICY_VIOLATION, _EXPECTED)
                return
        except KeyError:  # bytes
            await _close(self._websocket, status.WS_1003_UNSUPPORTED_DATA, _EXPECTED)
        except (WebSocketDisconnect, RuntimeError):
            pass  # closed
        finally:
            followed = list(self._tasks.values())
            for task in followed:
                task.cancel()
            await asyncio.gather(*followed, return_exceptions=True)

    def _obey(self, message: Any) -> bool:
        match message:
            case {"follow": str(task_id)} if 0 < len(task_id) <= 255:
                after = message.get("after")
                if not (after is None or (type(after) is int and 0 <= after <= 2**53)):
                    return False
                self._drop(task_id)
                if len(self._tasks) >= _TASKS_OF_A_SOCKET:
                    return False
                forward = self._desk.forward(
                    self._websocket, task_id, self._who, self._token, after
                )
                task = asyncio.create_task(forward, name="celeriac-follow")
                self._tasks[task_id] = task
                task.add_done_callback(lambda ended: self._ended(task_id, ended))
            case {"unfollow": str(task_id)}:
                self._drop(task_id)
            case _:
                return False
        return True

    def _drop(self, task_id: str) -> None:
        task = self._tasks.pop(task_id, None)
        if task is not None:
            task.cancel()

    def _ended(self, task_id: str, ended: "asyncio.Task[None]") -> None:
        if self._tasks.get(task_id) is ended:
            del self._tasks[task_id]


_EXPECTED = 'expected {"follow": "<task id>", "after": <number>} or {"unfollow": "<task id>"}'


async def _race(websocket: WebSocket, sending: Any) -> None:
    """Send until that ends or the client goes, whichever is first."""
    with suppress(WebSocketDisconnect):
        await until_first(
            # A socket that nobody receives from never notices that its client left.
            status_receive=_wait_for_disconnect(websocket),
            status_send=sending,
        )


async def _wait_for_disconnect(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        await websocket.close(code, reason)


def _close_code(http: int) -> int:
    return {404: _NOT_FOUND, 429: _TOO_MANY}.get(http, status.WS_1008_POLICY_VIOLATION)


def _tag(task: Status) -> str:
    if task.id is not None:
        return f'"{task.id}"'
    text = repr((task.state, task.result, task.error)).encode()
    return f'"{hashlib.sha256(text).hexdigest()[:16]}"'


def _with_record(event: Status, task: Status) -> Status:
    from dataclasses import replace

    return replace(event, record=task.record)
