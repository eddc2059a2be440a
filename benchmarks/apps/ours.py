"""The same Celery app, adopted."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery

import celeriac
from benchmarks.body import PAYLOAD, URL, begin, end

app = celeriac.adopt(Celery("bench", broker=URL, backend=URL))
app.conf.task_acks_late = True
app.conf.worker_pool = os.environ.get("BENCH_POOL", "prefork")


@app.task
async def noop(payload: str) -> bool:
    begin()
    return end()


@app.task
def noop_sync(payload: str) -> bool:
    begin()
    return end()


@app.task
async def wait(seconds: float) -> bool:
    begin()
    await asyncio.sleep(seconds)
    return end()


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "wait": wait}


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    yield TASKS[task].adelay


@asynccontextmanager
async def delay(task: str) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
    send_now = TASKS[task].delay

    async def send(argument: Any) -> None:
        send_now(argument)

    yield send


async def publish_many(count: int) -> None:
    await celeriac.publish_many([noop.s(PAYLOAD) for _ in range(count)])


async def gather(count: int) -> None:
    # Ten thousand at once wait for each other for longer than a call does by default.
    calls = (noop.aapply_async((PAYLOAD,), publish_timeout=60.0) for _ in range(count))
    await asyncio.gather(*calls)
