"""The WebSockets of `status_router`: of one task, and of as many as a client names."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import HTTPException, WebSocket, status
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.fastapi.desk import Desk
from celeriac.race import until_first
from celeriac.web.owners import Access
from celeriac.web.shown import LARGEST_NUMBER, UNKNOWN, TaskId, shown

_TRY_AGAIN_LATER = 1013
_CODES = {404: 4404, 429: 4429}  # for HTTP's
_AWAY = "the status store is away"
_PATIENCE = 30.0  # seconds for a client to take what waits for it
_TASKS = 100  # of a socket
_LONGEST = 4096  # characters of a message; the longest id has room, each character escaped
_EXPECTED = 'expected {"follow": "<task id>", "after": <number>} or {"unfollow": "<task id>"}'


@asynccontextmanager
async def opened(desk: Desk, websocket: WebSocket, access: Access) -> AsyncIterator[None]:
    """Accept it where that is allowed, and close it in the end, with the code for the reason."""
    desk.check_origin(websocket, access)
    await websocket.accept()
    try:
        yield
        await _close(websocket, status.WS_1000_NORMAL_CLOSURE)
    except HTTPException as error:
        code = _CODES.get(error.status_code, status.WS_1008_POLICY_VIOLATION)
        await _close(websocket, code, str(error.detail))
    except UnknownTaskError:
        await _close(websocket, _CODES[404], UNKNOWN)
    except ServiceError:
        await _close(websocket, _TRY_AGAIN_LATER, _AWAY)
    except WebSocketDisconnect:
        pass  # nobody is there to be told


async def follow_one(
    desk: Desk, websocket: WebSocket, task_id: str, access: Access, after: int | None
) -> None:
    async def send_all() -> None:
        async with aclosing(desk.told(task_id, after)) as events:
            async for event in events:
                await _send(websocket, shown(event, errors=desk.errors))

    with desk.stream(websocket, access):
        await desk.find(task_id, access)
        # A socket that nobody receives from never notices that its client left.
        await until_first(status_receive=_wait_for_disconnect(websocket), status_send=send_all())


async def _wait_for_disconnect(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


async def _send(websocket: WebSocket, message: dict[str, Any]) -> None:
    """Raises WebSocketDisconnect where the client is gone, or has taken nothing for too long.

    The connection of one that reads no more may stay open for ever, and with it all that it holds.
    """
    try:
        async with asyncio.timeout(_PATIENCE):
            await websocket.send_json(message)
    except TimeoutError:
        raise WebSocketDisconnect(status.WS_1006_ABNORMAL_CLOSURE) from None


async def _close(websocket: WebSocket, code: int, reason: str | None = None) -> None:
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            await websocket.close(code, reason)


class _Wish(BaseModel):
    model_config = ConfigDict(strict=True)

    follow: TaskId | None = None
    unfollow: TaskId | None = None
    after: Annotated[int, Field(ge=0, le=LARGEST_NUMBER)] | None = None


class Many:
    """A WebSocket on which a client says which tasks it follows: `{"follow": id, "after": n}`."""

    def __init__(self, desk: Desk, websocket: WebSocket, access: Access) -> None:
        self._desk, self._websocket, self._access = desk, websocket, access
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gone = asyncio.Event()

    async def serve(self) -> None:
        with self._desk.stream(self._websocket, self._access):
            try:
                await until_first(status_receive=self._receive(), status_gone=self._watch())
            finally:
                followed = list(self._tasks.values())
                for task in followed:
                    task.cancel()
                await asyncio.gather(*followed, return_exceptions=True)

    async def _receive(self) -> None:
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            if text is None:
                await _close(self._websocket, status.WS_1003_UNSUPPORTED_DATA, _EXPECTED)
                return
            if not self._obey(text):
                await _close(self._websocket, status.WS_1008_POLICY_VIOLATION, _EXPECTED)
                return

    async def _watch(self) -> None:
        """Until a frame could not be sent: who takes none may never say that it goes."""
        await self._gone.wait()
        raise WebSocketDisconnect(status.WS_1006_ABNORMAL_CLOSURE)

    def _obey(self, text: str) -> bool:
        if len(text) > _LONGEST:  # parsed, it would take many times its size
            return False
        try:
            wish = _Wish.model_validate_json(text)
        except ValidationError:
            return False
        if wish.follow is not None:
            self._drop(wish.follow)
            if len(self._tasks) >= _TASKS:
                return False
            self._follow(wish.follow, wish.after)
        elif wish.unfollow is not None:
            self._drop(wish.unfollow)
        else:
            return False
        return True

    def _follow(self, task_id: str, after: int | None) -> None:
        task = asyncio.create_task(self._forward(task_id, after), name="celeriac-follow")
        self._tasks[task_id] = task
        task.add_done_callback(lambda ended: self._ended(task_id, ended))

    def _drop(self, task_id: str) -> None:
        task = self._tasks.pop(task_id, None)
        if task is not None:
            task.cancel()

    def _ended(self, task_id: str, ended: "asyncio.Task[None]") -> None:
        if self._tasks.get(task_id) is ended:
            del self._tasks[task_id]

    async def _forward(self, task_id: str, after: int | None) -> None:
        """One task, over the socket, which may be gone meanwhile."""
        socket, errors = self._websocket, self._desk.errors
        try:
            try:
                await self._desk.find(task_id, self._access)
                async with aclosing(self._desk.told(task_id, after)) as events:
                    async for event in events:
                        await _send(socket, shown(event, errors=errors))
            except (HTTPException, UnknownTaskError):
                await _send(socket, {"task_id": task_id, "error": UNKNOWN, "code": "unknown"})
            except ServiceError:
                await _send(socket, {"task_id": task_id, "error": _AWAY, "code": "away"})
        except (WebSocketDisconnect, RuntimeError):
            self._gone.set()
