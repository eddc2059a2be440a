"""dramatiq: synchronous, in threads; results are asked for."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.body import URL, begin, end

broker: Any = RedisBroker(url=URL)
# The default names a result by a hash, which the harness could not find.
broker.add_middleware(Results(backend=RedisBackend(url=URL, use_namespace_prefix_keys=True)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(payload: str) -> bool:
    begin()
    return end()


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    async def send(argument: Any) -> None:
        noop.send(argument)

    yield send
