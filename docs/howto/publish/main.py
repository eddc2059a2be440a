"""Tasks, and coroutines that send them."""

import logging
import os
from collections.abc import Iterable

from celery import Celery
from celery.result import AsyncResult

import celeriac
from celeriac.task import Task

redis_url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
log = logging.getLogger(__name__)

celery = celeriac.adopt(Celery("worker", broker=redis_url, backend=redis_url))


@celery.task
async def charge(order_id: int) -> int:
    return order_id


async def charge_once(order_id: int, task_id: str) -> None:
    try:
        await charge.aapply_async((order_id,), task_id=task_id)
    except celeriac.PublishError as error:
        log.warning("%s", error)  # task … was not sent: no connection: …
        await charge.aapply_async((order_id,), task_id=task_id)


@celery.task
def report(user_id: int) -> str:
    return f"report of {user_id}"


async def report_to_all(user_ids: Iterable[int]) -> list[AsyncResult]:
    return await celeriac.publish_many(report.s(user_id) for user_id in user_ids)


@celery.task(bind=True, max_retries=3)
async def divide(self: Task, x: float, y: float) -> float:
    if y == 0:
        self.retry(countdown=1)
    return x / y
