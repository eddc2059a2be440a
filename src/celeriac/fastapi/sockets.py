"""The WebSockets of `status_router`: of one task, and of as many as a client names."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from fastapi import HTTPException, WebSocket, status
from starlette.websockets import WebSocketDisconnect

from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.fastapi.desk import Desk
from celeriac.fastapi.owners import Access
from celeriac.fastapi.views import UNKNOWN, shown
from celeriac.race import until_first

_TRY_AGAIN_LATER = 1013
_CODES = {404: 4404, 429: 4429}  # for HTTP's
_AWAY = "the status store is away"
_TASKS = 100  # of a socket
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


async def follow_one(
    desk: Desk, websocket: WebSocket, task_id: str, access: Access, after: int | None
) -> None:
    async def send_all() -> None:
        async with aclosing(desk.told(task_id, after)) as events:
            async for event in events:
                await websocket.send_json(shown(event, errors=desk.errors))

    with desk.stream(websocket, access), suppress(WebSocketDisconnect):
        await desk.find(task_id, access)
        # A socket that nobody receives from never notices that its client left.
        await until_first(status_receive=_wait_for_disconnect(websocket), status_send=send_all())


async def _wait_for_disconnect(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


async def _close(websocket: WebSocket, code: int, reason: str | None = None) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        await websocket.close(code, reason)


class Many:
    """A WebSocket on which a client says which tasks it follows: `{"follow": id, "after": n}`."""

    def __init__(self, desk: Desk, websocket: WebSocket, access: Access) -> None:
        self._desk, self._websocket, self._access = desk, websocket, access
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        with self._desk.stream(self._websocket, self._access):
            await self._serve()

    async def _serve(self) -> None:
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
                if len(self._tasks) >= _TASKS:
                    return False
                task = asyncio.create_task(self._forward(task_id, after), name="celeriac-follow")
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

    async def _forward(self, task_id: str, after: int | None) -> None:
        """One task, over the socket, which may be gone meanwhile."""
        send, errors = self._websocket.send_json, self._desk.errors
        with suppress(WebSocketDisconnect, RuntimeError):
            try:
                await self._desk.find(task_id, self._access)
                async with aclosing(self._desk.told(task_id, after)) as events:
                    async for event in events:
                        await send(shown(event, errors=errors))
            except (HTTPException, UnknownTaskError):
                await send({"task_id": task_id, "error": UNKNOWN, "code": "unknown"})
            except ServiceError:
                await send({"task_id": task_id, "error": _AWAY, "code": "away"})
