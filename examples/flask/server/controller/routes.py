"""The routes."""

from typing import Any

from flask import Blueprint, request
from pydantic import BaseModel, ValidationError

from celeriac.flask import PUBLIC, find_task, shown_error
from server.controller.tasks import long_task

routes = Blueprint("routes", __name__)


class NewTask(BaseModel):
    seconds: float = 5.0


@routes.get("/")
def index() -> dict[str, str]:
    return {"status": "success"}


@routes.post("/task/")
def start_task() -> tuple[dict[str, Any], int]:
    try:
        wanted = NewTask.model_validate(request.get_json(silent=True) or {})
    except ValidationError as error:
        return {"detail": error.errors(include_url=False)}, 422
    task = long_task.delay(wanted.seconds)
    return {"task_id": task.id, "state": "PENDING"}, 202


@routes.get("/task/<task_id>")
def task_state(task_id: str) -> dict[str, Any]:
    """404 if there is no such task; a task that failed is an answer like any other."""
    task = find_task(task_id, PUBLIC)
    answer: dict[str, Any] = {"task_id": task.task_id, "state": task.state}
    if task.state == "SUCCESS":
        answer["result"] = task.result
    elif task.state == "FAILURE":
        answer["error"] = shown_error(task, errors=False)
    return answer
