"""A worker whose parts can be stopped one by one; the environment says which broker and pool."""

import asyncio
import os
import time
from typing import Any

from celery import Celery
from celery.worker.control import control_command

import celeriac

celery = celeriac.adopt(
    Celery("health_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
)
celery.conf.worker_pool = os.environ.get("WORKER_POOL", "prefork")


@celery.task
def work(seconds: float) -> None:
    time.sleep(seconds)


@celery.task
async def block(seconds: float) -> None:
    """What no coroutine should do."""
    await asyncio.sleep(0)
    time.sleep(seconds)  # noqa: ASYNC251


@control_command()
def stand_still(state: Any, seconds: float) -> dict[str, str]:
    """Stop the main loop, once the answer is out."""
    state.consumer.call_soon(time.sleep, seconds)
    return {"ok": "soon"}


@control_command()
def close_channel(state: Any) -> dict[str, str]:
    state.consumer.call_soon(state.consumer.task_consumer.channel.close)
    return {"ok": "soon"}


@control_command()
def forget_channel(state: Any) -> dict[str, str]:
    """What bugs have done: the loop turns, and asks the broker for nothing any more."""
    poller = state.consumer.connection.transport.cycle
    poller.discard(state.consumer.task_consumer.channel)
    return {"ok": "forgotten"}
