"""What is shown of a task over HTTP, and who asks for it."""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, HTTPException, status
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.requests import HTTPConnection

from celeriac import records
from celeriac.errors import UnknownTaskError
from celeriac.fastapi.owners import Owner, checked, may_see
from celeriac.status import Event, Reader, Status, reader_of

UNKNOWN = "unknown task"

TaskId = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
]
"""A task's id in a path or a query; anything else is refused before it is looked up."""


async def _reader(connection: HTTPConnection) -> Reader:
    return reader_of(connection.app.celery)


ReaderDep = Annotated[Reader, Depends(_reader)]
"""Task states in a view of an application that was given its Celery app with `attach`."""


async def find_task(reader: Reader, task_id: str, owner: Owner, *, unowned: bool = False) -> Status:
    """The state of a task, if `owner`, as a policy gives it, may see it.

    Raises HTTPException 404 else, the same for a task that is not known and for somebody else's.
    `unowned`: as in `status_router`.
    """
    checked(owner)
    return await visible(
        reader, task_id, lambda found: may_see(owner, found.record, unowned=unowned)
    )


async def visible(reader: Reader, task_id: str, allows: Callable[[Status], bool]) -> Status:
    with suppress(UnknownTaskError):
        found = await reader.snapshot(task_id)
        if allows(found):
            return found
    raise HTTPException(status.HTTP_404_NOT_FOUND, UNKNOWN)


class TaskStatus(BaseModel):
    """A task's state, and what is known of it; keys without a value are left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "task_id": "5f0e3a0e-6f5a-4f0e-9d6f-0d2f4f7b8a11",
                    "state": "PROGRESS",
                    "id": 7,
                    "result": {"current": 3, "total": 10, "message": None},
                    "task": "project.users.tasks.export",
                    "queue": "default",
                    "published": "2026-01-02T03:04:05.678000Z",
                }
            ]
        }
    )

    task_id: str
    state: str
    id: int | None = None
    """The number of the event; a later one is higher."""
    result: Any = None
    error: str | None = None
    code: str | None = None
    time: float | None = None
    retry_at: float | None = None
    waiting: str | None = None
    """Why a PENDING task may not begin soon."""
    task: str | None = None
    queue: str | None = None
    published: datetime | None = None


class TaskList(BaseModel):
    tasks: list[TaskStatus]
    next: str | None = None
    """`?before=` of the next page; none on the last."""


def shown(event: Status | Event, *, errors: bool) -> dict[str, Any]:
    """`event` as JSON; see `shown_error`."""
    message = event.as_json()
    if isinstance(event, Status) and event.error is not None:
        message["error"] = shown_error(event, errors=errors)
    return message


def shown_error(task: Status, *, errors: bool) -> str | None:
    """Why it failed; without `errors`, what was not written for the public stays in the log."""
    if task.error is None or errors or task.safe:
        return task.error
    return f"the task failed: {task.code}" if task.code else "the task failed"


def described(task: Status, *, errors: bool) -> TaskStatus:
    record = task.record or records.Record(task="")
    more: dict[str, Any] = {"task": record.task or None, "queue": record.queue}
    if record.published:
        more["published"] = record.published
    return TaskStatus(**shown(task, errors=errors), **more)
