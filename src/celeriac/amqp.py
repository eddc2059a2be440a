"""Celery's sending of messages, made safe to call inside an asyncio task.

A task's tracer sends what follows it, and a body may call `delay`. Where that happens on an event
loop (see `bridge.hosted`), what blocks is done in a thread and awaited: waiting for a free producer
as well as sending, or those who hold the producers would never come to give them back. For the same
reason those who send have threads of their own.
"""

from contextvars import ContextVar
from functools import partial
from typing import Any

import celery.app.amqp
from celery import Celery
from kombu.connection import Connection
from kombu.messaging import Producer
from kombu.pools import ProducerPool

from celeriac import bridge, rabbitmq, records, threads, transport


class _Producer(Producer):
    def __init__(self, app: Celery, connection: Connection) -> None:
        self._app = app
        super().__init__(connection)

    def publish(self, *args: Any, **options: Any) -> Any:
        return bridge.offload(self._publish_once, super().publish, *args, **options)

    def _publish_once(self, publish: Any, *args: Any, **options: Any) -> Any:
        send = partial(publish, *args, **options)
        return rabbitmq.publish(self._app, self, send, options.get("exchange"))


# How many producers the caller holds.
_held: ContextVar[int] = ContextVar("celeriac_producers_held", default=0)


class _Producers(ProducerPool):
    def __init__(self, app: Celery) -> None:
        super().__init__(app.pool, limit=app.pool.limit, Producer=partial(_Producer, app))

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        # Those who hold all of them must not wait for another, nor behind those who wait for one
        # of theirs: a group of chords takes two.
        waits = block and not _held.get()
        take = partial(self._take, super().acquire, waits, timeout)
        if not bridge.hosted():
            return _noted(take())
        taken: list[Any] = []
        offload = bridge.offload_wait if waits else bridge.offload
        try:
            offload(lambda: taken.append(take()))
        except BaseException:
            for producer in taken:  # by the thread, for a body that was cancelled meanwhile
                producer.release()
            raise
        return _noted(taken[0])

    def _take(self, acquire: Any, block: bool, timeout: float | None) -> Any:
        try:
            return acquire(block, timeout)
        except self.LimitExceeded:
            if block:
                raise
            return self._one_more()

    def _one_more(self) -> Any:
        """For who does not wait, as remote control: it answers though tasks hold all producers."""
        connection = self.connections.connection.clone()
        producer: Any = self.Producer(connection)
        producer.release = connection.release
        return producer


def _noted(producer: Any) -> Any:
    release = producer.release

    def released() -> None:
        _held.set(max(0, _held.get() - 1))
        release()

    producer.release = released
    _held.set(_held.get() + 1)
    return producer


_LONGEST_PAUSE = 4.0  # seconds


class _Connection(transport.RedisConnection):
    def ensure_connection(
        self, errback: Any = None, max_retries: int | None = None, **options: Any
    ) -> Any:
        """As kombu's, which waits up to 30 s between its tries, when the broker may be back soon.

        Only where it tries for ever: those whose tries are counted would give up sooner.
        """
        if not max_retries and "interval_max" not in options:
            options |= {"interval_start": 1, "interval_step": 1, "interval_max": _LONGEST_PAUSE}
        return super().ensure_connection(errback, max_retries, **options)


class AMQP(celery.app.amqp.AMQP):  # type: ignore[misc]
    """Celery's, with producers that never block an event loop, and our transport for Redis."""

    Connection = _Connection

    def _create_task_sender(self) -> Any:
        send = super()._create_task_sender()

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            """Celery's, with the record of the task."""
            headers = message[0]
            headers.update(options.get("headers") or {})
            return records.publish(
                self.app,
                headers,
                self._queue_of(options),
                message[2][2] if isinstance(message[2], tuple) and len(message[2]) > 2 else None,
                partial(send, producer, name, message, **options),
                may_wait=getattr(producer, "may_wait", lambda: None),
            )

        return send_task_message

    def _queue_of(self, options: dict[str, Any]) -> str:
        queue = options.get("queue")
        if queue is None:
            queue = options.get("routing_key") or self.app.conf.task_default_queue
        return str(getattr(queue, "name", queue))

    @property
    def producer_pool(self) -> Any:
        if (sender := threads.sender(self.app)) is not None:
            return sender
        if self._producer_pool is None:  # Celery empties it after a fork
            self._producer_pool: Any = _Producers(self.app)
        return self._producer_pool

    def _retry_publish(self, publish: Any, *args: Any, **options: Any) -> Any:
        # It takes a producer, and waits between its attempts with time.sleep.
        return bridge.offload_wait(super()._retry_publish, publish, *args, **options)


class QuorumAMQP(AMQP):
    """With quorum queues where a queue is known by its name alone."""

    queues_cls = rabbitmq.Queues

    def Queues(self, queues: Any, *args: Any, **options: Any) -> Any:  # noqa: N802 - Celery's
        default = self.app.conf.task_default_queue
        return super().Queues(queues or [rabbitmq.queue(default)], *args, **options)


def use_amqp(app: Celery) -> None:
    """Give `app` these producers, unless it has an AMQP class of its own."""
    if app.amqp_cls == Celery.amqp_cls and "amqp" not in app.__dict__:
        app.amqp_cls = AMQP
