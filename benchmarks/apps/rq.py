"""rq: JSON instead of pickle."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from benchmarks.body import URL, begin, end


def noop(payload: str) -> bool:
    begin()
    return end()


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    with Redis.from_url(URL) as client:
        queue = Queue(connection=client, serializer=JSONSerializer)

        async def send(argument: Any) -> None:
            queue.enqueue(noop, argument)

        yield send
