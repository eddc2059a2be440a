"""The routes of the status of tasks."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, Any

from celery import Celery
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    WebSocket,
    status,
)  # fmt: skip
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from celeriac import dead
from celeriac.app import watching_runs
from celeriac.errors import DeadLetterError, ServiceError, UnknownTaskError
from celeriac.fastapi import sockets
from celeriac.fastapi.desk import Desk
from celeriac.fastapi.owners import OwnerPolicy, checked
from celeriac.status import Event, Status, reader_of
from celeriac.web import STATIC
from celeriac.web.owners import PUBLIC, Access, Owner, ReadTokens
from celeriac.web.shown import (
    LARGEST_NUMBER,
    LONGEST_WAIT,
    NO_DEAD_LETTER,
    NOT_CANCELLED,
    PAGE,
    TO_ALL,
    TRY_AGAIN,
    TaskId,
    TaskList,
    TaskStatus,
    described,
    matches,
    shown,
    tag_of,
    tags_in,
)

Events = AsyncIterator[Status | Event]

_UNAVAILABLE = status.HTTP_503_SERVICE_UNAVAILABLE
_ANSWERS = {
    204: "It has ended, and the end has been seen",
    304: "It is still as `If-None-Match` says",
    404: "Unknown, or not yours",
    409: "It is no dead letter",
    429: "Too many streams are open: close some",
    503: "The status store or the task queue is away: try again later",
}
_DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}


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
    """Everything about tasks over HTTP, SSE and WebSocket: see docs/howto/live-status.md.

    `owner` is the policy that says whose tasks a connection may see, such as `public`; of any
    other's it is told, byte for byte, what is told of an unknown one. Pages of other sites are
    refused a WebSocket, except those of `origins`. With `unowned` a task that is nobody's, such as
    one that was sent from a shell, is shown to whoever knows its id. With `errors` the messages of
    all errors are shown, not only those that were written for the public. `tokens` lets who has one
    of them read what it says, and nothing else. So many `streams` may be open in one process of one
    owner, of one token's task or owner, and of one client's address where there is neither.
    """
    desk = Desk(
        celery, origins=origins, unowned=unowned, errors=errors, tokens=tokens, streams=streams
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = watching_runs(celery)
        await asyncio.to_thread(watching.__enter__)
        try:
            # Kept open between requests, closed with the application.
            async with reader_of(celery), desk.stopping.watched():
                yield
        finally:
            await asyncio.to_thread(watching.__exit__, None, None, None)

    router = APIRouter(lifespan=lifespan, tags=["tasks"])
    Who = Annotated[Owner, Depends(owner)]  # noqa: N806
    # Documented without a null, which neither an address nor a header has.
    Number = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)] | SkipJsonSchema[None]  # noqa: N806
    After = Annotated[Number, Query()]  # noqa: N806

    async def access(
        who: Who, response: Response, token: Annotated[str | None, Query(max_length=1000)] = None
    ) -> AsyncIterator[Access]:
        by_token = token is not None and tokens is not None
        headers = TO_ALL if by_token else {}
        response.headers.update(headers)
        try:
            yield desk.access(who, token)
        except HTTPException as error:
            error.headers = {**(error.headers or {}), **headers}
            raise

    Reading = Annotated[Access, Depends(access)]  # noqa: N806

    async def readable(task_id: TaskId, reading: Reading) -> Status:
        return await desk.find(task_id, reading)

    async def own(task_id: TaskId, who: Who) -> Status:
        return await desk.find(task_id, desk.access(who))

    Readable = Annotated[Status, Depends(readable)]  # noqa: N806
    Own = Annotated[Status, Depends(own)]  # noqa: N806

    @router.get(
        "/tasks/{task_id}", response_model_exclude_none=True, responses=_answers(304, 404, 503)
    )
    async def get_task(
        task: Readable,
        response: Response,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> TaskStatus:
        """The state now. With `wait`, in seconds: the one after `If-None-Match`, or the last."""
        seen = tags_in(if_none_match)
        if wait:
            task = await desk.wait(task, wait, seen)
        task = await desk.reader.with_hint(task)
        response.headers.update({"ETag": tag_of(task), "Cache-Control": "no-cache"})
        if matches(task, seen):
            raise HTTPException(status.HTTP_304_NOT_MODIFIED, headers={"ETag": tag_of(task)})
        return described(task, errors=errors)

    if tokens is not None:

        @router.options("/tasks/{task_id}", include_in_schema=False)
        async def allow_if_none_match() -> Response:
            """A browser asks before a page of another origin may send that, as long polls do."""
            headers = {**TO_ALL, "Access-Control-Allow-Headers": "If-None-Match"}
            return Response(status_code=status.HTTP_204_NO_CONTENT, headers=headers)

    @router.get("/tasks", response_model_exclude_none=True, responses=_answers(503))
    async def list_tasks(
        who: Who,
        before: Annotated[str | None, Query(pattern=PAGE)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> TaskList:
        """The owner's recent tasks, the newest first."""
        if who == PUBLIC:
            return TaskList(tasks=[])  # nobody's are listed
        found, following = await desk.reader.recent(checked(who), limit, before)
        return TaskList(tasks=[described(each, errors=errors) for each in found], next=following)

    @router.delete(
        "/tasks/{task_id}",
        status_code=status.HTTP_202_ACCEPTED,
        response_model_exclude_none=True,
        responses=_answers(404, 503),
    )
    async def cancel_task(task: Own) -> TaskStatus:
        """Cancel: what waits never starts, what runs is told to stop."""
        try:
            return described(await desk.reader.cancel(task.task_id), errors=errors)
        except ServiceError as error:
            raise HTTPException(_UNAVAILABLE, NOT_CANCELLED, TRY_AGAIN) from error

    @router.post(
        "/tasks/{task_id}/retry",
        status_code=status.HTTP_202_ACCEPTED,
        response_model_exclude_none=True,
        responses=_answers(404, 409, 503),
    )
    async def retry_task(task: Own) -> TaskStatus:
        """Send a dead letter again, as a new task."""
        try:
            task_id = await asyncio.to_thread(dead.send_anew, desk.celery, task.task_id)
        except DeadLetterError as error:
            raise HTTPException(status.HTTP_409_CONFLICT, NO_DEAD_LETTER) from error
        return described(await desk.reader.snapshot(task_id), errors=errors)

    # A dependency ends with its request. A view that yields may be left where it waits to be read,
    # and with it whatever it holds.
    async def followed(
        request: Request,
        task: Readable,
        reading: Reading,
        after: After = None,
        last_event_id: Annotated[Number, Header()] = None,
    ) -> AsyncIterator[Events]:
        after = last_event_id if last_event_id is not None else after
        if task.terminal and task.id is not None and after is not None and after >= task.id:
            raise HTTPException(status.HTTP_204_NO_CONTENT)  # which ends an EventSource for good
        with desk.stream(request, reading):
            async with aclosing(desk.told_until_stopped(task.task_id, after)) as events:
                yield events

    @router.get(
        "/tasks/{task_id}/events",
        response_class=EventSourceResponse,
        responses=_answers(204, 404, 429, 503),
    )
    async def task_events(
        events: Annotated[Events, Depends(followed)],
    ) -> AsyncIterator[ServerSentEvent]:
        """What happens from now on, or after `Last-Event-ID`, to the end, as server-sent events."""
        with suppress(UnknownTaskError, ServiceError):  # any more: the client asks again
            async for event in events:
                data = shown(event, errors=errors)
                number = None if event.id is None else str(event.id)
                yield ServerSentEvent(data=data, id=number)

    @router.websocket("/ws/task_status/{task_id}")
    async def task_socket(
        websocket: WebSocket, task_id: TaskId, reading: Reading, after: After = None
    ) -> None:
        async with sockets.opened(desk, websocket, reading):
            await sockets.follow_one(desk, websocket, task_id, reading, after)

    @router.websocket("/ws/tasks")
    async def tasks_socket(websocket: WebSocket, reading: Reading) -> None:
        async with sockets.opened(desk, websocket, reading):
            await sockets.Many(desk, websocket, reading).serve()

    @router.get("/celeriac/client.js", include_in_schema=False)
    async def client() -> FileResponse:
        """The browser's side of all this, an ES module."""
        return FileResponse(STATIC / "client.js", media_type="text/javascript", headers=TO_ALL)

    return router


def _answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What is documented of them. The content has its type: a stream's refusal is no stream."""
    content = {"content": {"application/json": {"schema": _DETAIL}}}
    return {
        code: {"description": _ANSWERS[code]} | (content if code >= 400 else {}) for code in codes
    }
