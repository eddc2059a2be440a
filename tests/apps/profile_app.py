"""Tasks of an app that `create_celery` made; the environment says which services and options."""

import json
import os
import time

from celery import Task
from redis import Redis

import celeriac
from celeriac.store import redis_url

notes = Redis.from_url(redis_url(os.environ.get("NOTES") or os.environ["BACKEND"]))
settings = celeriac.Settings(
    celery_broker_url=os.environ["BROKER"], celery_result_backend=os.environ["BACKEND"]
)
celery = celeriac.create_celery(settings, **json.loads(os.environ.get("OPTIONS", "{}")))


@celery.task
def note(key: str) -> float:
    """The time at which it ran."""
    now = time.time()
    notes.rpush(f"note:{key}", now)
    return now


@celery.task(bind=True, max_retries=None)
def again(self: Task, key: str, countdowns: list[float]) -> None:
    notes.rpush(f"note:{key}", time.time())
    if countdowns:
        raise self.retry(args=(key, countdowns[1:]), countdown=countdowns[0])


@celery.task
def slow(key: str, seconds: float) -> str:
    notes.rpush(f"note:{key}", time.time())
    time.sleep(seconds)
    return key


@celery.task
def failed(request: object, error: object, _: object) -> None:
    notes.rpush("note:errback", repr(error))
