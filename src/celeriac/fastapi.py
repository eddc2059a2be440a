"""FastAPI's edge: the application's Celery app in every request, and live status of its tasks."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Annotated
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from celery import Celery
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket, WebSocketException, status
from fastapi.responses import JSONResponse
from kombu.exceptions import OperationalError
from pydantic import StringConstraints
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from celeriac.app import use_app
from celeriac.errors import ServiceError
from celeriac.race import until_first
from celeriac.status import Reader, Status

_SAFE_METHODS = {"GET", "HEAD", "OPTIONS", "TRACE"}
_FIRST_FRAME = 5.0  # seconds; a status store that is silent for longer is away
_TRY_AGAIN_LATER = 1013

_readers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Celery, Reader]] = WeakKeyDictionary()


TaskId = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
]
"""A task's id in a path or a query; anything else is refused before it is looked up."""


def attach(app: FastAPI, celery: Celery) -> None:
    """Give `app` its Celery app: `app.celery`, `app.celery_app`, and `current_app` in requests.

    A task that cannot be sent because the broker is away answers 503 with `Retry-After`.
    """
    app.celery = app.celery_app = celery  # type: ignore[attr-defined]
    app.add_middleware(AppContextMiddleware, celery=celery)
    for error in (OperationalError, RedisConnectionError, RedisTimeoutError, ServiceError):
        app.add_exception_handler(error, _unavailable)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(
        {"detail": "the task queue is away, nothing was accepted: try again later"},
        status.HTTP_503_SERVICE_UNAVAILABLE,
        headers={"Retry-After": "5"},
    )


class AppContextMiddleware:
    """Shared tasks called inside a request belong to the request's own Celery app."""

    def __init__(self, app: ASGIApp, celery: Celery) -> None:
        self._app, self._celery = app, celery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with use_app(self._celery):
            await self._app(scope, receive, send)


class SameOriginMiddleware:
    """Refuse (403) what a page of another site makes a browser send in its user's name.

    A state-changing request, or a WebSocket, that carries an Origin must carry our own, or one of
    `origins` (`https://host[:port]`). A client that sends none, such as curl, is no browser.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            if not same_origin(Headers(scope=scope), self._origins):
                response = JSONResponse({"detail": "this request comes from another site"}, 403)
                await response(scope, receive, send)
                return
        elif scope["type"] == "websocket" and not same_origin(Headers(scope=scope), self._origins):
            # Closing before accepting is how ASGI refuses a handshake: the client sees 403.
            await send({"type": "websocket.close", "code": status.WS_1008_POLICY_VIOLATION})
            return
        await self._app(scope, receive, send)


def same_origin(headers: Headers, origins: Collection[str] = ()) -> bool:
    """Whether the request may be our own page's. The scheme is not compared: a proxy ends TLS."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "").lower() not in ("cross-site", "same-site")
    if origin in origins:
        return True
    ours, theirs = _authority(f"http://{headers.get('host', '')}"), _authority(origin)
    return theirs is not None and ours == theirs


def _authority(origin: str) -> tuple[str, int | None] | None:
    """Host and port, None for a scheme's own; None for what no page of ours can have."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.hostname, None if port in (80, 443) else port


def reader_of(celery: Celery) -> Reader:
    """The one reader of `celery`'s task states in the running event loop."""
    readers = _readers.setdefault(asyncio.get_running_loop(), {})
    return readers.setdefault(celery, Reader(celery))


async def _reader(connection: HTTPConnection) -> Reader:
    return reader_of(connection.app.celery)


ReaderDep = Annotated[Reader, Depends(_reader)]
"""Task states in a view of an application that was given its Celery app with `attach`."""


def status_router(celery: Celery, *, origins: Collection[str] = ()) -> APIRouter:
    """The WebSocket `/ws/task_status/{task_id}`: the state now, then every change to the last.

    A frame is `{"task_id", "state"}` and, where there is one, `"result"` or `"error"`. The socket
    closes with 1000 after the terminal state, with 1013 where the status store does not answer.
    Pages of other sites are refused, except those of `origins`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with reader_of(celery):  # kept open between sockets, closed with the application
            yield
        _readers[asyncio.get_running_loop()].pop(celery, None)

    router = APIRouter(lifespan=lifespan)

    @router.websocket("/ws/task_status/{task_id}")
    async def task_status(websocket: WebSocket, task_id: TaskId) -> None:
        if not same_origin(websocket.headers, origins):
            raise WebSocketException(status.WS_1008_POLICY_VIOLATION)
        await websocket.accept()
        async with reader_of(celery).follow(task_id) as states:
            await _forward(websocket, states)

    return router


async def _forward(websocket: WebSocket, states: AsyncIterator[Status]) -> None:
    """Send `states` until they end or the client goes, whichever is first."""
    with suppress(WebSocketDisconnect):
        await until_first(
            # A socket that nobody receives from never notices that its client left.
            status_receive=_wait_for_disconnect(websocket),
            status_send=_send_all(websocket, states),
        )


async def _send_all(websocket: WebSocket, states: AsyncIterator[Status]) -> None:
    try:
        async with asyncio.timeout(_FIRST_FRAME):
            first = await anext(states)
    except TimeoutError:
        await websocket.close(_TRY_AGAIN_LATER, "the status store is away")
        return
    await websocket.send_json(first.as_json())
    async for state in states:
        await websocket.send_json(state.as_json())
    await websocket.close()


async def _wait_for_disconnect(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
