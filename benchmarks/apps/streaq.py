"""streaq: JSON instead of pickle, uvloop, no line per task."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from streaq import Worker

from benchmarks.body import CONCURRENCY, URL, begin, end

worker: Any = Worker(
    URL,
    concurrency=CONCURRENCY,
    serializer=json.dumps,
    deserializer=json.loads,
    anyio_kwargs={"use_uvloop": True},
)


@worker.task(silent=True)
async def noop(payload: str) -> bool:
    begin()
    return end()


@worker.task(silent=True)
async def wait(seconds: float) -> bool:
    begin()
    await asyncio.sleep(seconds)
    return end()


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    registered = {"noop": noop, "wait": wait}[task]

    async def send(argument: Any) -> None:
        await registered.enqueue(argument)

    async with worker:
        yield send
