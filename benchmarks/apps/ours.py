"""The same Celery app, adopted."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery

import celeriac
from benchmarks.body import PAYLOAD, URL, begin, end
from celeriac.records import as_owner

OWNER = "bench"

app = celeriac.adopt(Celery("bench", broker=URL, backend=URL))
app.conf.task_acks_late = True
app.conf.worker_pool = os.environ.get("BENCH_POOL", "prefork")
if os.environ.get("BENCH_TOLD") in ("nothing", "ends"):
    app.conf.task_track_started = False
if os.environ.get("BENCH_TOLD") == "nothing":
    # There is no such switch: the worker's side of what is told, taken out. Results, and the runs
    # that a killed worker leaves behind, are written as ever.
    from celeriac import backend, events

    for module, name in ((backend, "_record_text"), (events, "of_state")):
        assert hasattr(module, name)
        setattr(module, name, lambda *_: "")


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


@app.task
async def timed(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return time.monotonic_ns()


@app.task
def timed_sync(seconds: float) -> int:
    time.sleep(seconds)
    return time.monotonic_ns()


TASKS: dict[str, Any] = {
    "noop": noop,
    "noop_sync": noop_sync,
    "wait": wait,
    "timed": timed,
    "timed_sync": timed_sync,
}


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    yield TASKS[task].adelay


@asynccontextmanager
async def delay(task: str) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
    send_now = TASKS[task].delay

    async def send(argument: Any) -> None:
        send_now(argument)

    yield send


async def start(task: str, seconds: float) -> str:
    with as_owner(OWNER):
        return str((await TASKS[task].adelay(seconds)).id)


async def publish_many(count: int) -> None:
    await celeriac.publish_many([noop.s(PAYLOAD) for _ in range(count)])


async def gather(count: int) -> None:
    # Ten thousand at once wait for each other for longer than a call does by default.
    calls = (noop.aapply_async((PAYLOAD,), publish_timeout=60.0) for _ in range(count))
    await asyncio.gather(*calls)
