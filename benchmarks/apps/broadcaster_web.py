"""The web process that goes with it: one subscription for each socket, over one connection."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket

from benchmarks.apps.broadcaster import broadcast, state_of


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await broadcast.connect()
    yield
    await broadcast.disconnect()


web = FastAPI(lifespan=lifespan)


@web.websocket("/ws/task_status/{task_id}")
async def task_status(websocket: WebSocket, task_id: str) -> None:
    await websocket.accept()
    async with broadcast.subscribe(channel=task_id) as subscriber:
        await websocket.send_json(state_of(task_id))  # it may have ended
        async for event in subscriber:
            await websocket.send_json(json.loads(event.message))
