"""saq: JSON by itself, uvloop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from saq import Queue

from benchmarks.body import CONCURRENCY, URL, begin, end

asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
queue = Queue.from_url(URL)


async def noop(context: Any, *, payload: str) -> bool:
    begin()
    return end()


async def wait(context: Any, *, payload: float) -> bool:
    begin()
    await asyncio.sleep(payload)
    return end()


settings = {"queue": queue, "functions": [noop, wait], "concurrency": CONCURRENCY}


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    await queue.connect()

    async def send(argument: Any) -> None:
        await queue.enqueue(task, payload=argument)

    try:
        yield send
    finally:
        await queue.disconnect()
