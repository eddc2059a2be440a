"""Celery's sending of messages, made safe to call inside an asyncio task.

A task's tracer sends what follows it, and a body may call `delay`. Where that happens on an event
loop (see `bridge.hosted`), what blocks is done in a thread and awaited: waiting for a free producer
as well as sending, or those who hold the producers would never come to give them back. For the same
reason those who send have threads of their own.
"""

from typing import Any

import celery.app.amqp
from celery import Celery
from kombu.messaging import Producer
from kombu.pools import ProducerPool

from celeriac import bridge, threads, transport


class _Producer(Producer):
    def publish(self, *args: Any, **options: Any) -> Any:
        return bridge.offload(super().publish, *args, **options)


class _Producers(ProducerPool):
    Producer = _Producer

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        acquire: Any = super().acquire
        if not bridge.hosted():
            try:
                return acquire(block, timeout)
            except self.LimitExceeded:
                if block:
                    raise
                return self._one_more()
        taken: list[Any] = []
        try:
            bridge.offload_wait(lambda: taken.append(acquire(block, timeout)))
        except BaseException:
            for producer in taken:  # by the thread, for a body that was cancelled meanwhile
                producer.release()
            raise
        return taken[0]

    def _one_more(self) -> Any:
        """For remote control, which never waits: it answers though tasks hold all producers."""
        connection = self.connections.connection.clone()
        producer: Any = self.Producer(connection)  # type: ignore[no-untyped-call]
        producer.release = connection.release
        return producer


class AMQP(celery.app.amqp.AMQP):  # type: ignore[misc]
    """Celery's, with producers that never block an event loop, and our transport for Redis."""

    Connection = transport.RedisConnection

    @property
    def producer_pool(self) -> Any:
        if (sender := threads.sender(self.app)) is not None:
            return sender
        if self._producer_pool is None:  # Celery empties it after a fork
            pool = self.app.pool
            self._producer_pool: Any = _Producers(pool, limit=pool.limit)  # type: ignore[no-untyped-call]
        return self._producer_pool

    def _retry_publish(self, publish: Any, *args: Any, **options: Any) -> Any:
        # It takes a producer, and waits between its attempts with time.sleep.
        return bridge.offload_wait(super()._retry_publish, publish, *args, **options)


def use_amqp(app: Celery) -> None:
    """Give `app` these producers, unless it has an AMQP class of its own."""
    if app.amqp_cls == Celery.amqp_cls and "amqp" not in app.__dict__:
        app.amqp_cls = AMQP
