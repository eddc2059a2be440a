"""Celery as it is."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery

from benchmarks.body import PAYLOAD, URL, begin, end

app = Celery("bench", broker=URL, backend=URL)
app.conf.task_acks_late = True
app.conf.task_track_started = bool(os.environ.get("BENCH_STARTED"))


@app.task
def noop(payload: str) -> bool:
    begin()
    return end()


@app.task
def wait(seconds: float) -> bool:
    begin()
    time.sleep(seconds)
    return end()


@app.task
def timed(seconds: float) -> int:
    time.sleep(seconds)
    return time.monotonic_ns()


TASKS: dict[str, Any] = {"noop": noop, "wait": wait, "timed": timed}


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
    """`delay()` in the loop."""
    delay = TASKS[task].delay

    async def send(argument: Any) -> None:
        delay(argument)

    yield send


@asynccontextmanager
async def threadpool(task: str) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
    """What FastAPI's `run_in_threadpool` does: at most 40 threads."""
    delay = TASKS[task].delay
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(40) as pool:

        async def send(argument: Any) -> None:
            await loop.run_in_executor(pool, delay, argument)

        yield send


async def start(task: str, seconds: float) -> str:
    return str(TASKS[task].delay(seconds).id)


async def delay_loop(count: int) -> None:
    for _ in range(count):
        noop.delay(PAYLOAD)


async def batch(count: int) -> None:
    """Celery's own messages, in kombu's pipelines of a thousand."""
    with app.amqp.producer_pool.acquire(block=True) as producer, producer.batch():
        for _ in range(count):
            noop.apply_async((PAYLOAD,), producer=producer, retry=False)
