"""A socket that is told one state and no more: what one costs before anybody follows a task."""

from fastapi import FastAPI, WebSocket

web = FastAPI()


@web.websocket("/ws/task_status/{task_id}")
async def task_status(websocket: WebSocket, task_id: str) -> None:
    await websocket.accept()
    await websocket.send_json({"task_id": task_id, "state": "PENDING"})
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
