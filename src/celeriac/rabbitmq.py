"""What RabbitMQ is told of an app's queues, and what its refusals mean.

Queues are quorum queues: replicated where there are several nodes, and with a count of deliveries,
so that a message that nobody survives is put aside at last instead of going round for ever.
"""

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import celery.app.amqp
from amqp.exceptions import NotFound, PreconditionFailed
from celery import Celery, bootsteps
from celery.utils.quorum_queues import detect_quorum_queues
from celery.utils.time import maybe_iso8601, subtract_datetimes
from kombu.common import Broadcast
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.messaging import Producer
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from celeriac.errors import PublishError

EXCHANGE = "celeriac"
DEAD = "celeriac.dead"  # an exchange, and the queue behind it
# Far above `max_deliveries`: a broker that resets its connections gives back, each time, what is
# only prefetched, and counts it.
DELIVERIES = 100
_DELAYS = "celery_delayed_"


def queue(name: str) -> Queue:
    """The quorum queue `name`; what it gives up on goes to `DEAD`.

    Its exchange is a topic, since a delayed message arrives with the bits of its delay before its
    key. The key has no dot, or the key of `mail` would be the end of that of `slow.mail`.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERIES,
        "x-dead-letter-exchange": DEAD,
        # Confirmed by the other queue before it is gone from this one, which needs the second.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    exchange = Exchange(EXCHANGE, "topic")
    return Queue(name, exchange, key, queue_arguments=arguments)


def dead_queue() -> Queue:
    """Where messages go that reached the limit of deliveries, expired or were rejected.

    The header `x-death` says which. No limit of its own: nothing is behind it.
    """
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
    exchange = Exchange(DEAD, "fanout")
    return Queue(DEAD, exchange, DEAD, queue_arguments=arguments)


class Queues(celery.app.amqp.Queues):  # type: ignore[misc]
    """Celery's, whose missing queues are made like those that are listed."""

    def new_missing(self, name: str) -> Queue:
        if self.create_missing_queue_type == "quorum":
            return queue(name)
        found: Queue = super().new_missing(name)
        return found


def feeds_dead_letters(app: Celery) -> bool:
    """Whether a queue of `app` gives up on messages in favour of `DEAD`."""
    arguments = [each.queue_arguments or {} for each in app.amqp.queues.values()]
    return any(each.get("x-dead-letter-exchange") == DEAD for each in arguments)


class DeadLetters(bootsteps.StartStopStep):  # type: ignore[misc]
    """Declares where a worker's queues put what they give up on."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def include_if(self, c: Any) -> bool:
        return feeds_dead_letters(c.app)

    def start(self, c: Any) -> None:
        with c.connection.channel() as channel:
            dead_queue()(channel).declare()


def refuse_mismatch(app: Celery) -> None:
    """End a worker's start with one line if a queue of its own exists as another one."""
    with app.connection_for_read() as connection:
        if connection.transport.driver_type != "amqp":
            return
        try:
            for each in app.amqp.queues.consume_from.values():
                each(connection.default_channel).declare()
        except PreconditionFailed as error:
            raise SystemExit(f"error: {remedy(error)}") from None
        except (*connection.connection_errors, *connection.channel_errors):
            return  # whatever it is, the worker comes to it, and has a policy


def remedy(error: PreconditionFailed) -> str:
    """What to do about a declaration that does not match what exists, in one line."""
    reason = str(error.reply_text).removeprefix("PRECONDITION_FAILED - ")
    found = re.search(r"for queue '([^']*)' in vhost '([^']*)'", reason)
    if found is None:
        return f"RabbitMQ refuses: {reason}"
    name, vhost = found.groups()
    return (
        f"queue {name!r} exists on RabbitMQ with other properties ({reason}): empty it and "
        f"`rabbitmqctl delete_queue {name} -p {vhost}`, or keep it as it is with "
        "CELERY_TASK_DEFAULT_QUEUE_TYPE=classic"
    )


def publish(app: Celery, producer: Producer, send: Callable[[], Any], exchange: Any) -> Any:
    """What `send` gives, which publishes to `exchange`.

    Raises PublishError, with the remedy, for a queue that exists as another one.
    """
    delayed = str(getattr(exchange, "name", exchange)).startswith(_DELAYS)
    if delayed and app not in _delaying:
        declare_delays(app, producer.connection)
    try:
        return send()
    except PreconditionFailed as error:
        raise PublishError(remedy(error)) from error
    except NotFound:
        if not delayed:
            raise
    connection = producer.connection
    connection.collect()  # RabbitMQ closed the channel, and may have been emptied
    declare_delays(app, connection)
    producer.revive(connection)
    return send()


_delaying: WeakSet[Celery] = WeakSet()  # for which this process has declared what delays


def declare_delays(app: Celery, connection: Connection) -> None:
    """What delays messages, as Celery's workers declare it: one may be sent before they start.

    Without the exchange it would be refused. Without its queue it would come, when there is a
    worker at last, minutes after that.
    """
    kind = app.conf.broker_native_delayed_delivery_queue_type
    # Another one, with whose end its many channels are closed, and with the same limits.
    limits = {
        "connect_timeout": connection.connect_timeout,
        "transport_options": connection.transport_options,
    }
    with app.connection_for_write(**limits) as other:
        declare_native_delayed_delivery_exchanges_and_queues(other, kind)
        for each in app.amqp.queues.values():
            if not isinstance(each, Broadcast):
                each(other.default_channel).declare()
                bind_queue_to_native_delayed_delivery_exchange(other, each)
    _delaying.add(app)


def delay(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that Celery 5.7 would not accept for quorum queues, as it accepts them.

    It fails with a ValueError where less than a second is left; this makes it one.
    """
    eta = options.get("eta")
    if eta:
        left = subtract_datetimes(maybe_iso8601(eta), app.now()).total_seconds()
    else:
        left = options["countdown"]
    if not 0 < left < 1.1 or not detect_quorum_queues(app, "amqp")[0]:
        return {}
    if eta:  # it comes nearer until Celery looks at it
        return {"eta": app.now() + timedelta(seconds=1.1)}
    return {"countdown": max(left, 1)}
