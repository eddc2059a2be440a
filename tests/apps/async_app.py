"""Tasks with `async def` bodies, for workers of every pool; the environment says which broker.

Those whose names end in `_sync` have synchronous bodies and do the same.
"""

import asyncio
import os
import time
from typing import Any

from celery import Celery, Task, current_task, shared_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from pydantic import BaseModel
from redis import Redis

import celeriac
from celeriac.store import redis_url

celery = celeriac.adopt(
    Celery("async_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
)
celery.conf.result_expires = 300
if "WORKER_POOL" in os.environ:
    celery.conf.worker_pool = os.environ["WORKER_POOL"]
notes = Redis.from_url(redis_url(os.environ["BACKEND"]))


def note(key: str, value: object) -> None:
    """Something that the test shall see."""
    notes.rpush(f"note:{key}", str(value))


@celery.task(bind=True)
async def add(self: Task, x: int, y: int) -> int:
    await asyncio.sleep(0.01)
    return x + y


@celery.task(bind=True)
def add_sync(self: Task, x: int, y: int) -> int:
    return x + y


@celery.task(bind=True)
async def who_am_i(self: Task) -> list[str]:
    """The request's id as the body sees it, and an asyncio task, and a thread that it starts."""

    async def child() -> str:
        await asyncio.sleep(0)
        seen: str = self.request.id
        return seen

    await asyncio.sleep(0.05)
    return [
        self.request.id,
        current_task.request.id,
        await asyncio.create_task(child()),
        await asyncio.to_thread(lambda: self.request.id),
    ]


@celery.task(bind=True)
def who_am_i_sync(self: Task) -> list[str]:
    before = self.request.id
    time.sleep(0.05)  # others have their turn
    return [before, self.request.id, current_task.request.id, current_task.request.id]


@celery.task
async def total(numbers: list[int]) -> int:
    await asyncio.sleep(0)
    return sum(numbers)


@celery.task
def total_sync(numbers: list[int]) -> int:
    return sum(numbers)


@celery.task
async def fail(message: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(message)


@celery.task
def fail_sync(message: str) -> None:
    raise ValueError(message)


@celery.task(bind=True, max_retries=2)
async def retry_by_hand(self: Task) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    tries: int = self.request.retries
    return tries


@celery.task(bind=True, max_retries=2)
def retry_by_hand_sync(self: Task) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    tries: int = self.request.retries
    return tries


@celery.task(bind=True, autoretry_for=(ConnectionError,), max_retries=2, default_retry_delay=0.1)
async def retry_by_declaration(self: Task) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise ConnectionError
    tries: int = self.request.retries
    return tries


@celery.task(bind=True, autoretry_for=(ConnectionError,), max_retries=2, default_retry_delay=0.1)
def retry_by_declaration_sync(self: Task) -> int:
    if self.request.retries < 2:
        raise ConnectionError
    tries: int = self.request.retries
    return tries


@celery.task(bind=True)
async def ignore(self: Task) -> None:
    self.update_state(state="SEEN")
    raise Ignore


@celery.task(bind=True)
def ignore_sync(self: Task) -> None:
    self.update_state(state="SEEN")
    raise Ignore


@celery.task(acks_late=True)
async def reject() -> None:
    note("reject", "run")
    raise Reject("no", requeue=False)


@celery.task(acks_late=True)
def reject_sync() -> None:
    note("reject", "run")
    raise Reject("no", requeue=False)


@celery.task
async def handle_error(request: Any, error: Exception, traceback: Any) -> None:
    note("errback", error)


@celery.task
def handle_error_sync(request: Any, error: Exception, traceback: Any) -> None:
    note("errback", error)


@celery.task
async def leave_a_child() -> int:
    async def child() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            note("child", "cleaned up")

    background.append(asyncio.create_task(child()))
    await asyncio.sleep(0)
    return 1


background: list[asyncio.Task[None]] = []


@celery.task
async def loop_of_this_process() -> tuple[int, int]:
    return os.getpid(), id(asyncio.get_running_loop())


@celery.task(soft_time_limit=1)
async def too_long() -> str:
    try:
        await asyncio.sleep(30)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0.01)  # there is time to clean up
        note("soft", "raised inside")
        raise
    return "never"


@celery.task
async def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)


@celery.task
async def cancel_itself_at_the_end() -> int:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    return 1


class Point(BaseModel):
    x: int
    y: int


@celery.task(pydantic=True)
async def mirror(point: Point) -> Point:
    await asyncio.sleep(0)
    return Point(x=point.y, y=point.x)


@celery.task(pydantic=True)
def mirror_sync(point: Point) -> Point:
    return Point(x=point.y, y=point.x)


class Foreign(Task):  # type: ignore[misc]
    """Somebody's base class that knows nothing of ours."""

    def after_return(self, status: str, *_: object) -> None:
        note("after_return", status)


@celery.task(base=Foreign)
async def foreign(x: int) -> int:
    await asyncio.sleep(0)
    return x


@celery.task(base=Foreign)
def foreign_sync(x: int) -> int:
    return x


celery.finalize()


@celery.task(base=Foreign)
async def foreign_and_late(x: int) -> int:
    """Made after the app was finalized, as in a module that is imported late."""
    await asyncio.sleep(0)
    return x


@celery.task(base=Foreign)
def foreign_and_late_sync(x: int) -> int:
    return x


class ClassBased(celery.Task):  # type: ignore[misc,name-defined]
    name = "async_app.class_based"

    async def run(self, x: int) -> int:
        await asyncio.sleep(0)
        return x + 1


class_based = celery.register_task(ClassBased())


class ClassBasedSync(celery.Task):  # type: ignore[misc,name-defined]
    name = "async_app.class_based_sync"

    def run(self, x: int) -> int:
        return x + 1


class_based_sync = celery.register_task(ClassBasedSync())


@shared_task
async def shared(x: int) -> int:
    await asyncio.sleep(0)
    return x


@shared_task
def shared_sync(x: int) -> int:
    return x


@celery.task
async def eager_call() -> int:
    """Synchronous code in the middle of a body that runs another async body."""
    await asyncio.sleep(0)
    result: int = add.apply((20, 22)).result
    return result


@celery.task
def eager_call_sync() -> int:
    """A synchronous body that runs an async one."""
    result: int = add.apply((20, 22)).result
    return result


@signals.task_success.connect
def succeeded(sender: Task, result: object, **_: object) -> None:
    if sender.name.startswith("async_app.foreign"):
        note("success", result)
