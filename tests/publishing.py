"""What the tests of publishing share."""

import asyncio
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


class Turns:
    count = 0


@contextmanager
def turns(pause: float = 0.0) -> Iterator[Turns]:
    """How often the loop came back to somebody who gives it `pause` seconds for others each time.

    One whom a call blocks does not come back, however fast the machine is.
    """
    taken = Turns()

    async def take() -> None:
        while True:
            await asyncio.sleep(pause)
            taken.count += 1

    taker = asyncio.create_task(take())
    try:
        yield taken
    finally:
        taker.cancel()
