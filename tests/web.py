"""A server with the routes of live status, and its clients."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from celery import Celery
from fastapi import Depends, FastAPI, Request
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from websockets.asyncio.client import ClientConnection, connect

from celeriac import records
from celeriac.fastapi import IdempotencyDep, ReadTokens, attach, owned_by, status_router
from support import free_port

TOKENS = ReadTokens("0123456789abcdef")


async def user(connection: HTTPConnection) -> str:
    """Who asks, as the client says: the tests trust it."""
    return connection.headers.get("x-user", "")


class Web:
    """A server, and its clients."""

    def __init__(self, celery: Celery, port: int, http: httpx.AsyncClient) -> None:
        self.celery, self.port, self.http = celery, port, http

    def socket(
        self, path: str, who: str = "", headers: Mapping[str, str] | None = None, **options: Any
    ) -> connect:
        sent = {**(headers or {}), **({"X-User": who} if who else {})}
        return connect(f"ws://127.0.0.1:{self.port}{path}", additional_headers=sent, **options)

    async def publish(self, who: str, **options: Any) -> str:
        signature = self.celery.signature("work", **options)
        with records.as_owner(who):
            return str((await asyncio.to_thread(signature.apply_async)).id)

    async def store(self, task_id: str, result: Any, state: str) -> None:
        await asyncio.to_thread(self.celery.backend.store_result, task_id, result, state)


@asynccontextmanager
async def serve(
    celery: Celery, *, middleware: Sequence[Middleware] = (), **options: Any
) -> AsyncIterator[Web]:
    app = FastAPI(middleware=list(middleware))
    attach(app, celery)
    given: dict[str, Any] = {"owner": user, "tokens": TOKENS} | options
    app.include_router(status_router(celery, **given))

    @app.post("/work", status_code=202, dependencies=[Depends(owned_by(user))])
    async def work(request: Request, idempotency: IdempotencyDep) -> dict[str, str]:
        return {"task_id": (await idempotency.send(request.app.celery.signature("work"))).id}

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="on"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            yield Web(celery, port, http)
    finally:
        server.should_exit = True
        await serving


def states_in(frames: list[dict[str, Any]]) -> list[str]:
    return [frame["state"] for frame in frames if "state" in frame]


async def frames(socket: ClientConnection) -> list[dict[str, Any]]:
    return [json.loads(frame) async for frame in socket]
