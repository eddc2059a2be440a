"""What the tests of publishing share."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from celeriac import adopt


def make_app(broker: str, backend: str = "disabled://", **options: Any) -> Celery:
    app = Celery("publish", broker=broker, backend=backend, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    app.conf.update(options)
    adopt(app)

    @app.task(shared=False, name="add")
    def add(x: int, y: int = 0) -> int:
        return x + y

    return app


def take(app: Celery, queue: str | None = None) -> Any:
    """The next message in the queue, as a consumer gets it; None if there is none."""
    with app.connection() as connection:
        channel = connection.default_channel
        message = channel.basic_get(queue or app.conf.task_default_queue, no_ack=True)
        return message and channel.message_to_python(message)


def took_task_ids(app: Celery) -> list[str]:
    ids = []
    while (message := take(app)) is not None:
        ids.append(message.headers["id"])
    return ids


@contextmanager
def lags() -> Iterator[list[float]]:
    """How late each tick of the loop comes, in seconds."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due)

    ticker = asyncio.create_task(tick())
    try:
        yield late
    finally:
        ticker.cancel()
