"""A route that is asked again and again, over Celery's own result."""

from typing import Any

from celery.result import AsyncResult
from fastapi import FastAPI

from benchmarks.apps.stock import app

web = FastAPI()


@web.get("/tasks/{task_id}")
def get_task(task_id: str) -> dict[str, Any]:
    found = AsyncResult(task_id, app=app)
    return {"task_id": task_id, "state": found.state, "result": found.result}
