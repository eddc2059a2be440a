"""Tasks that tell what they do, for workers that are followed."""

import asyncio
import json
import os
import time
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore
from redis import Redis

import celeriac
from celeriac.errors import PublicError
from celeriac.records import current_owner
from celeriac.store import redis_url

celery = Celery("status_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
celery.conf.update(
    {"task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1}
    | json.loads(os.environ.get("CONF", "{}"))
)
if pool := os.environ.get("WORKER_POOL"):
    celery.conf.worker_pool = pool
celeriac.adopt(
    celery,
    lease=float(os.environ.get("LEASE", "2")),
    status_store=os.environ.get("STATUS_STORE"),
)


def note(key: str, value: str) -> None:
    with Redis.from_url(redis_url(os.environ.get("NOTES", os.environ["BACKEND"]))) as client:
        client.rpush(f"note:{key}", value)


@celery.task(bind=True)
async def tell(self: Any, count: int) -> int:
    for n in range(count):
        await self.emit("line", f"line {n}")
    self.progress(count, count, "all told")
    return count


@celery.task(bind=True)
def tell_sync(self: Any, count: int) -> int:
    for n in range(count):
        self.emit("line", f"line {n}")
    self.progress(count, count, "all told")
    return count


@celery.task(bind=True, ignore_result=True)
async def quiet(self: Any) -> int:
    return 5


@celery.task(bind=True)
async def count_up(self: Any, count: int) -> int:
    """Much faster than anyone can be told."""
    for n in range(count):
        self.progress(n + 1, count)
    return count


@celery.task(bind=True, max_retries=1)
async def again(self: Any) -> str:
    if not self.request.retries:
        raise self.retry(countdown=1, exc=ValueError("not yet"))
    return "now"


@celery.task
async def refuse() -> None:
    raise PublicError("too_large", "The file is too large.")


@celery.task
async def wait(seconds: float) -> str:
    note("started", str(os.getpid()))
    await asyncio.sleep(seconds)
    return "waited"


@celery.task
def wait_sync(seconds: float) -> str:
    note("started", str(os.getpid()))
    time.sleep(seconds)
    return "waited"


@celery.task(bind=True)
async def parent(self: Any) -> list[str]:
    """Sends a child and gives both owners."""
    child = await owner.aapply_async(queue=self.request.delivery_info["routing_key"])
    return [current_owner(), child.id]


@celery.task
async def owner() -> str:
    return current_owner()


@celery.task
def add(x: int, y: int) -> int:
    return x + y


class Hooked(celery.Task):  # type: ignore[name-defined, misc]
    """Somebody's own hook, which knows nothing of ours."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("started", "hook")


def note_start() -> None:
    note("started", "body")


async def note_start_soon() -> None:
    note("started", "body")


celery.task(base=Hooked, name="status_app.hooked")(note_start)
celery.task(base=Hooked, name="status_app.hooked_async")(note_start_soon)
celery.task(base=Task, name="status_app.foreign")(note_start)
celery.task(base=Task, name="status_app.foreign_async")(note_start_soon)
celery.task(
    base=Task, name="status_app.foreign_retried", autoretry_for=(ValueError,), max_retries=1
)(note_start)


@celery.task(bind=True)
async def step_together(self: Any, steps: int) -> None:
    """From asyncio tasks of the body's own."""

    async def one(step: int) -> None:
        self.progress(step)
        self.update_state(state=f"STEP-{step}", meta={"step": step})

    await asyncio.gather(*map(one, range(steps)))


@celery.task(bind=True)
async def leave_at_once(self: Any, turns: int) -> None:
    """While what it told is being sent."""
    self.emit("line", 1)
    for _ in range(turns):
        await asyncio.sleep(0)


@celery.task(bind=True)
def ignore(self: Any, state: str | None = None) -> None:
    if state:
        self.update_state(state=state, meta="as it was left")
    raise Ignore


@celery.task(bind=True)
def hand_over(self: Any) -> None:
    raise self.replace(add.s(1, 2).set(queue=self.request.delivery_info["routing_key"]))


@celery.task(bind=True, base=Task)
def hand_over_foreign(self: Any) -> None:
    raise self.replace(add.s(1, 2).set(queue=self.request.delivery_info["routing_key"]))
