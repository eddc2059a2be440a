"""taskiq: a list is popped, a stream is acknowledged after the result is saved."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from taskiq.serializers import JSONSerializer
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.body import URL, begin, end

if os.environ.get("BENCH_BROKER") == "list":
    broker: Any = ListQueueBroker(URL)
else:
    broker = RedisStreamBroker(URL, consumer_id="0")  # what was sent before it started, too
broker = broker.with_result_backend(
    RedisAsyncResultBackend(URL, prefix_str="result", serializer=JSONSerializer())
)


@broker.task
async def noop(payload: str) -> bool:
    begin()
    return end()


@broker.task
async def wait(seconds: float) -> bool:
    begin()
    await asyncio.sleep(seconds)
    return end()


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    await broker.startup()
    try:
        yield {"noop": noop, "wait": wait}[task].kiq
    finally:
        await broker.shutdown()
