"""huey: JSON instead of pickle. It has no acknowledgement: what a dead worker held is lost."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from huey import RedisHuey
from huey.registry import Message
from huey.serializer import Serializer

from benchmarks.body import URL, begin, end


class Json(Serializer):  # type: ignore[misc, unused-ignore]
    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        value = json.loads(data)
        return Message(*value) if isinstance(value, list) else value


huey = RedisHuey("bench", url=URL, serializer=Json())


@huey.task()
def noop(payload: str) -> bool:
    begin()
    return end()


@asynccontextmanager
async def sender(task: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    async def send(argument: Any) -> None:
        noop(argument)

    yield send
