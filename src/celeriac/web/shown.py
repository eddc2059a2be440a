"""What is shown of a task over HTTP, by whatever framework."""

import hashlib
from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Any

from kombu.exceptions import OperationalError
from pydantic import BaseModel, ConfigDict, StringConstraints
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from celeriac import records
from celeriac.errors import PublishError, ServiceError
from celeriac.status import Event, Status

UNKNOWN = "unknown task"
NO_DEAD_LETTER = "it is no dead letter"
NOT_CANCELLED = "it may run on, though it may be shown as ended: try again later"
TRY_AGAIN = {"Retry-After": "5"}
# To any page, which a browser lets read what was asked for without a cookie.
TO_ALL = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "ETag"}
LONGEST_WAIT = 60.0  # seconds of a long poll
LARGEST_NUMBER = 2**53  # of an event
PAGE = r"^[1-9][0-9]{0,18}-[0-9]{1,19}$"  # where a page of a list begins
# What says that a server is away: 503.
AWAY = OperationalError, RedisConnectionError, RedisTimeoutError, ServiceError

TaskId = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
]
"""A task's id in a path or a query; anything else is refused before it is looked up."""


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


def tag_of(task: Status) -> str:
    if task.id is not None:
        return f'"{task.id}-waiting"' if task.waiting else f'"{task.id}"'
    text = repr((task.state, task.result, task.error, task.waiting)).encode()
    return f'"{hashlib.sha256(text).hexdigest()[:16]}"'


def tags_in(header: str | None) -> set[str]:
    """Of an If-None-Match, which compares weakly: a proxy that compresses says W/ of ours."""
    return {tag.strip().removeprefix("W/") for tag in (header or "").split(",")} - {""}


def matches(task: Status, tags: Collection[str]) -> bool:
    return tag_of(task) in tags or "*" in tags


def away(error: Exception) -> str:
    """What whoever sends a task, or asks for one, is told of a server that is away."""
    if isinstance(error, PublishError):
        outcome = "the task may have been" if error.maybe_accepted else "nothing was"
        return f"the task queue is away, {outcome} accepted: try again later"
    return "the task queue is away: try again later"


def too_many(streams: int) -> str:
    return f"{streams} streams are open: close some"
