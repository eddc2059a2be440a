"""arq: JSON instead of pickle, uvloop, no line per job."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import RedisSettings

from benchmarks.body import CONCURRENCY, URL, begin, end

QUIET = {"version": 1, "disable_existing_loggers": False}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


async def noop(context: Any, payload: str) -> bool:
    begin()
    return end()


async def wait(context: Any, seconds: float) -> bool:
    begin()
    await asyncio.sleep(seconds)
    return end()


class Worker:
    functions = (noop, wait)
    redis_settings = RedisSettings.from_dsn(URL)
    max_jobs = CONCURRENCY
    job_serializer = staticmethod(dumps)
    job_deserializer = staticmethod(json.loads)


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    pool = await create_pool(
        Worker.redis_settings, job_serializer=dumps, job_deserializer=json.loads
    )

    async def send(argument: Any) -> None:
        await pool.enqueue_job(task, argument)

    try:
        yield send
    finally:
        await pool.aclose()
