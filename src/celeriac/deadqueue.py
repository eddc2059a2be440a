"""What RabbitMQ gives up on comes to an end that can be read, and is kept.

RabbitMQ puts a message aside whose deliveries reached their limit, that nobody took before it
expired, or that was rejected, and tells nobody. Workers take it from there, whatever is in it,
write the end of its task, and keep it as a dead letter.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import bootsteps, signals, states
from celery.app.task import Context
from celery.worker.request import Request
from kombu.message import Message
from kombu.messaging import Consumer

from celeriac import burial, dead, delivery, messages, rabbitmq, runs
from celeriac.errors import DeadLetterError, DeliveryLimitError, UndeliveredError

logger = logging.getLogger(__name__)

_AT_ONCE = 10  # messages
_PAUSE = 2.0  # seconds before a message is given back that could not be dealt with

_LIMIT, _EXPIRED = "delivery_limit", "expired"


@dataclass(frozen=True, slots=True)
class Death:
    """What RabbitMQ says of the last one: a delay ends in one too, before the message arrives."""

    reason: str | None = None  # None: somebody has put it there
    queue: str = "?"
    exchange: str | None = None
    routing_key: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> "Death":
        match headers.get("x-death"):
            case [{"reason": str(reason), "queue": str(queue), **rest}, *_]:
                exchange, keys = rest.get("exchange"), rest.get("routing-keys")
                key = keys[0] if isinstance(keys, list) and keys else None
                return cls(
                    reason, queue,
                    exchange if isinstance(exchange, str) else None,
                    key if isinstance(key, str) else None,
                )  # fmt: skip
        return cls()

    def error(self) -> Exception:
        if self.reason == _LIMIT:
            return DeliveryLimitError(queue=self.queue)
        return UndeliveredError(queue=self.queue, reason=str(self.reason))


class DeadQueue(bootsteps.ConsumerStep):  # type: ignore[misc]
    """Takes what the app's queues have given up on, where there is a place for dead letters."""

    requires = (rabbitmq.DeadLetters, "celery.worker.consumer.tasks:Tasks")

    def include_if(self, c: Any) -> bool:
        if not rabbitmq.feeds_dead_letters(c.app):
            return False
        try:
            with dead.letters(c.app):
                return True
        except DeadLetterError as error:
            logger.warning("what RabbitMQ gives up on stays in %s: %s", rabbitmq.DEAD, error)
            return False

    def get_consumers(self, channel: Any) -> list[Consumer]:
        made: Any = Consumer
        consumer: Consumer = made(
            channel, [rabbitmq.dead_queue()], on_message=self._take,
            accept=self._c.app.conf.accept_content, prefetch_count=_AT_ONCE,
        )  # fmt: skip
        consumer.on_decode_error = lambda message, _: self._take(message)
        return [consumer]

    def start(self, c: Any) -> None:
        self._c = c
        super().start(c)

    def _take(self, message: Message) -> None:
        try:
            settled = Settling(self._c, message).settle()
        except delivery.AWAY as error:
            logger.warning("what RabbitMQ gave up on waits: %r", error)
            settled = False
        if settled:
            message.ack_log_error(logger, self._c.connection_errors)  # type: ignore[no-untyped-call]
        else:
            self._c.timer.call_after(_PAUSE, self._c.call_soon, (self._give_back, message))

    def _give_back(self, message: Message) -> None:
        connection = message.channel and message.channel.connection
        if connection is not None and connection.connected:  # or else it comes again
            message.reject_log_error(logger, self._c.connection_errors, requeue=True)  # type: ignore[no-untyped-call]


class Settling:
    """One message, in a worker whose consumer is `c`."""

    def __init__(self, c: Any, message: Message) -> None:
        self._c, self._app, self._message = c, c.app, message
        self._death = Death.of(message.headers)
        self._id, self._task = burial.identity(message)

    def settle(self) -> bool:
        """Whether that is all. Raises what is one of `delivery.AWAY`, and may be called again."""
        known = messages.is_id(self._id)
        if known and self._runs():
            return False  # its worker lost the message, and is about to say how it ends
        state = self._app.backend.get_state(self._id) if known else states.PENDING
        if self._death.reason != _EXPIRED:
            if self._death.reason == _LIMIT and state in (states.SUCCESS, states.REVOKED):
                return True
            self._bury()
        if known and self._death.reason is not None and state not in states.READY_STATES:
            try:
                self._end()
            except messages.MALFORMED:
                logger.exception("the end of task %s is not recorded", self._id)
        return True

    def _runs(self) -> bool:
        keeper = runs.of(self._app)
        if keeper is None:
            return False
        field = runs.field_of_headers(self._message.headers)
        record = keeper.find(field)
        if record is None or record.holder == keeper.holder:
            return delivery.runs_here(field)
        return keeper.alive(record)

    def _bury(self) -> None:
        death = self._death
        raw = dead.message_of(self._message, death.exchange, death.routing_key)
        reason = (death.reason or "dropped").replace("_", " ")
        identity = {"id": self._id, "task": self._task}
        with dead.letters(self._app) as kept:
            # Of what a worker rejected, it has said why.
            first = death.reason != _LIMIT
            error = "" if death.reason is None else repr(death.error())
            kept.bury(identity, raw, reason, death.queue, error, first=first)

    def _end(self) -> None:
        request = self._request()
        if self._death.reason == _EXPIRED:
            logger.info("task %s has expired in its queue", self._id)
            context = request._context if isinstance(request, Request) else request
            self._app.backend.mark_as_revoked(self._id, "expired", request=context)
            if isinstance(request, Request):
                signals.task_revoked.send(
                    sender=request.task, request=context, terminated=False, signum=None,
                    expired=True,
                )  # fmt: skip
            return
        error = self._death.error()
        logger.error("task %s: %s", self._id, error)
        if isinstance(request, Request):
            delivery.fail(request, error)
        else:
            self._app.backend.mark_as_failure(self._id, error, request=request)

    def _request(self) -> "Request | Context":
        """As far as the message is one."""
        message, app = self._message, self._app
        try:
            messages.check(app, message, messages.limit_of(app))
            task = app.tasks.get(self._task)
            payload = message.payload
            if (
                task is not None
                and "task" in message.headers
                and isinstance(payload, (list, tuple))
            ):
                return Request(
                    message, app=app, task=task, hostname=self._c.hostname,
                    eventer=self._c.event_dispatcher, connection_errors=self._c.connection_errors,
                )  # fmt: skip
            follows = payload[2] or {} if isinstance(payload, (list, tuple)) else {}
            return Context(message.headers | follows)
        except Exception as error:  # whatever a decoder raises
            logger.warning("what follows task %s is not known: %r", self._id, error)
            return Context(id=self._id, task=self._task)
