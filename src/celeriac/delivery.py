"""How a worker takes in what may have run before, and what no worker should take in again.

A message that comes again is looked up among the runs (see `runs`). While the first run's worker
lives, it waits. Where starts had no end, their worker died of them, or beside them: such a suspect
runs alone among suspects, so that the innocent come to an end, and after `max_deliveries` starts it
is a dead letter.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from amqp.exceptions import ResourceLocked
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, signals, states
from celery.concurrency import prefork
from celery.exceptions import BackendError, InvalidTaskError, NotRegistered
from celery.utils.objects import Bunch
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request
from kombu.exceptions import ContentDisallowed, DecodeError, OperationalError
from kombu.message import Message
from redis.exceptions import RedisError

from celeriac import burial, messages, records, runs
from celeriac.errors import PoisonError

logger = logging.getLogger(__name__)

MAX_DELIVERIES = 3
_LOOK_AGAIN = 1.0  # seconds
_LOCKED = 0.5  # seconds until a queue is asked for again that the lost connection still has

max_deliveries: WeakKeyDictionary[Celery, int] = WeakKeyDictionary()

_Handle = Callable[..., Any]


@dataclass(slots=True, eq=False)
class _Delivery:
    """A message that came again, and what Celery would do with it."""

    handle: _Handle
    task: Task
    message: Message
    body: Any
    ack: Callable[..., Any]
    reject: Callable[..., Any]
    callbacks: Iterable[Any]
    waits: bool = False  # and does not count for the prefetch limit
    contended: bool = False  # a run of it was seen that had not ended
    ends: int | None = None  # after so many starts

    @property
    def field(self) -> str:
        return runs.field_of_headers(self.message.headers)


class _NotNowError(Exception):
    """A message cannot be kept: where dead letters are does not answer."""


# Of servers, not of messages: the same message may do later.
AWAY = _NotNowError, RedisError, OperationalError, BackendError


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's, which also keeps what it refuses, and looks at what comes again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._suspects: deque[_Delivery] = deque()
        self._alone: str | None = None  # the suspect that runs
        self._connected = 0
        self._waiting: set[_Delivery] = set()
        super().__init__(*args, **options)
        # RabbitMQ has not noticed yet that the connection is gone which the queue of the worker's
        # remote control belongs to: Celery would end the worker.
        self.connection_errors += (ResourceLocked,)

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        return self._connected_to(self.app.connection_for_read, heartbeat=heartbeat)

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Any:
        return self._connected_to(self.app.connection_for_write, url=url, heartbeat=heartbeat)

    def _connected_to(self, make: Callable[..., Any], **options: Any) -> Any:
        """Over these go events and answers to remote control, which no task is lost with.

        To have each confirmed would stop the worker's main loop as long as RabbitMQ is silent.
        """
        if make().get_transport_cls().driver_type == "amqp":
            options["transport_options"] = {"confirm_publish": False}
        return self.ensure_connected(make(**options))

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        dispatcher = self.event_dispatcher
        if dispatcher is not None and dispatcher.connection is not None:
            # The network that lost the one lost this one too: Celery would say goodbye to RabbitMQ
            # over it, and wait for the answer before it connects again.
            dispatcher.connection.collect()
        if isinstance(exc, ResourceLocked):
            time.sleep(_LOCKED)

    def update_strategies(self) -> None:
        super().update_strategies()
        for name, handle in self.strategies.items():
            self.strategies[name] = partial(self._receive, handle, self.app.tasks[name])

    def create_task_handler(self, *args: Any, **options: Any) -> _Handle:
        handle: _Handle = super().create_task_handler(*args, **options)
        limit = messages.limit_of(self.app)

        def checked(message: Message) -> None:
            try:
                messages.check(self.app, message, limit)
                handle(message)
            except messages.MALFORMED as error:
                # Written by nobody's Celery: it must not end the worker.
                self._refuse(message, InvalidTaskError(repr(error)))
            except (InvalidTaskError, ContentDisallowed, DecodeError) as error:
                self._refuse(message, error)

        return lambda message: self._attempt(message, partial(checked, message))

    def _attempt(self, message: Message, act: Callable[[], Any]) -> None:
        """Do something about a message, again until the servers that it takes are there."""
        try:
            act()
        except AWAY as error:
            if message.acknowledged:
                logger.error("the end of a refused message is not recorded: %r", error)
                return
            logger.warning("a message waits: %r", error)
            self._later(partial(self._attempt, message, act))

    def _later(self, act: Callable[[], Any]) -> None:
        connected = self._connected

        def again() -> None:
            if connected == self._connected:  # or else the message comes again
                act()

        self.timer.call_after(_LOOK_AGAIN, self.call_soon, (again,))

    def on_close(self) -> None:
        super().on_close()
        self._suspects.clear()
        self._waiting.clear()  # they come again, over another connection
        self._connected += 1
        if self._alone is not None and not runs_here(self._alone):
            self._alone = None

    # What Celery drops, or hands back to RabbitMQ, is kept, and whoever waits for its task hears.

    def _refuse(self, message: Message, error: Exception) -> None:
        if message.acknowledged:
            logger.error("a message was refused too late: %r", error)
            return
        if isinstance(error, InvalidTaskError):
            self.on_invalid_task(None, message, error)
        else:
            self.on_decode_error(message, error)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        if not isinstance(message, Message):  # whoever took it from the server has more of it
            raise exc
        tell = partial(super().on_decode_error, message, exc)
        self._attempt(message, lambda: self._keep("unreadable", message, exc, tell))

    def on_unknown_message(self, body: Any, message: Message) -> None:
        tell = partial(super().on_unknown_message, body, message)
        self._keep("no task", message, None, tell)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        _, name = burial.identity(message)
        tell = partial(super().on_unknown_task, body, message, exc)
        self._keep("unknown task", message, NotRegistered(name), tell)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        tell = partial(super().on_invalid_task, body, message, exc)
        self._keep("invalid", message, exc, tell)

    def _keep(
        self, reason: str, message: Message, error: Exception | None, tell: Callable[[], Any]
    ) -> None:
        """Raises what is one of `AWAY` where that is not possible now; `tell` is Celery's part."""
        if not isinstance(message.body, (str, bytes, bytearray, memoryview)):
            message.body = b"" if message.body is None else repr(message.body).encode()
        task_id, name = burial.identity(message)
        if not burial.bury(self.app, message, reason, error):
            raise _NotNowError
        if error is not None and messages.is_id(task_id):
            told = error if isinstance(error, NotRegistered) else InvalidTaskError(str(error))
            self._fail(message, str(task_id), name, told)
        try:
            tell()
        except messages.MALFORMED as failed:  # in what it writes into the log
            logger.error("a message was refused: %r", failed)
            if not message.acknowledged:
                message.ack()  # type: ignore[no-untyped-call]

    def _fail(self, message: Message, task_id: str, name: Any, error: Exception) -> None:
        request = Bunch(name=name, chord=None, root_id=None, errbacks=None, **_replies(message))
        try:
            if self.app.backend.get_state(task_id) not in states.READY_STATES:
                self.app.backend.mark_as_failure(task_id, error, request=request)
        except AWAY:
            raise
        except Exception:  # of any other result backend
            logger.exception("the end of the refused task %s is not recorded", task_id)

    # From here on: what comes again.

    def _receive(
        self,
        handle: _Handle,
        task: Task,
        message: Message,
        body: Any,
        ack: Callable[..., Any],
        reject: Callable[..., Any],
        callbacks: Iterable[Any],
    ) -> Any:
        reject = partial(self._reject, message, reject)
        if records.OWNER not in message.headers:
            self._record(message)
        if not task.acks_late and "id" in message.headers and runs.of(self.app) is not None:
            ack = partial(self._acknowledge_early, task, message, ack)
        redelivered = (message.delivery_info or {}).get("redelivered")
        if not redelivered or "id" not in message.headers or runs.of(self.app) is None:
            return handle(message, body, ack, reject, callbacks)
        delivery = _Delivery(handle, task, message, body, ack, reject, callbacks)
        return self._look_at(delivery)

    def _record(self, message: Message) -> None:
        """Of a task whose producer has not the library: it is known from now on."""
        book = records.book_of(self.app)
        if book is not None and isinstance(message.headers.get("id"), str):
            info = message.delivery_info or {}
            queue = info.get("routing_key") or ""
            book.note(message.headers, queue)

    def _acknowledge_early(self, task: Task, message: Message, ack: _Handle, *log: Any) -> None:
        """Record the run first: whoever dies now has taken a message that is nowhere else."""
        known = runs.of(self.app)
        if known is not None:
            elsewhere = isinstance(self.pool, prefork.TaskPool)
            payload = message.payload
            follows = payload[2] if isinstance(payload, (list, tuple)) else {}
            try:
                request = message.headers | message.properties | (follows or {})
                known.announce(task.name, request, elsewhere=elsewhere)
            except RedisError as error:
                logger.warning("a task begins whose run is not recorded yet: %r", error)
        ack(*log)

    def _reject(
        self, message: Message, reject: _Handle, log: Any, errors: Any, requeue: bool = False
    ) -> None:
        """As a worker does whose pool has lost the process: others need not wait for its end."""
        known = runs.of(self.app)
        if requeue and known is not None and "id" in message.headers:
            try:
                known.give_back(runs.field_of_headers(message.headers))
            except RedisError as error:
                logger.warning("a lost run is not noted, others wait for this worker: %s", error)
        reject(log, errors, requeue)

    def _look_at(self, delivery: _Delivery) -> None:
        self._attempt(delivery.message, partial(self._look, delivery))

    def _look(self, delivery: _Delivery) -> None:
        known = runs.of(self.app)
        assert known is not None
        if delivery.ends is not None:
            return self._end(delivery, delivery.ends)
        field = delivery.field
        try:
            record = known.find(field)
            alive = record is not None and record.holder != known.holder and known.alive(record)
        except RedisError as error:
            logger.warning("whether %s runs elsewhere is not known: %s", field, error)
            return self._wait(delivery)
        if alive or runs_here(field):
            delivery.contended = True
            return self._wait(delivery)
        if not delivery.task.acks_late:
            # Its acknowledgement did not arrive, and yet it must not begin a second time.
            if record is not None:
                self._end_lost(known, record)
            if record is not None or known.over(field):
                return self._drop(delivery)
        if record is None:
            return self._drop(delivery) if self._has_ended(delivery) else self._run(delivery)
        if record.starts >= max_deliveries.get(self.app, MAX_DELIVERIES):
            return self._end(delivery, record.starts)
        if self._alone is None:
            return self._run_alone(delivery)
        self._let_others_by(delivery)
        self._suspects.append(delivery)
        return None

    def _end_lost(self, known: runs.Runs, record: runs.Record) -> None:
        try:
            known.end_lost(record)
        except AWAY:
            raise
        except Exception:  # of what follows it; whoever misses its worker tries again
            logger.exception("the end of %s is not recorded yet", record.field)

    def _has_ended(self, delivery: _Delivery) -> bool:
        """Whether the run that was waited for came to an end, and only its acknowledgement not."""
        if not delivery.contended or delivery.task.backend is None:
            return False
        state = delivery.task.backend.get_state(delivery.message.headers["id"])
        return state in states.READY_STATES or state == states.RETRY

    def _drop(self, delivery: _Delivery) -> None:
        logger.info("task %s has ended since it came again", delivery.field)
        self._go_on(delivery)
        delivery.ack(logger, self.connection_errors)

    def _wait(self, delivery: _Delivery) -> None:
        self._let_others_by(delivery)
        self._later(partial(self._look_at, delivery))

    @property
    def waiting(self) -> list[Message]:
        """What came again and is not handed on yet."""
        return [delivery.message for delivery in self._waiting]

    def _let_others_by(self, delivery: _Delivery) -> None:
        if not delivery.waits:
            delivery.waits = True
            self._waiting.add(delivery)
            self.qos.increment_eventually()

    def _go_on(self, delivery: _Delivery) -> None:
        if delivery.waits:
            delivery.waits = False
            self._waiting.discard(delivery)
            self.qos.decrement_eventually()

    def _run(self, delivery: _Delivery) -> None:
        self._go_on(delivery)
        self._hand_on(delivery, delivery.ack, delivery.reject)

    def _run_alone(self, delivery: _Delivery) -> None:
        self._go_on(delivery)
        self._alone = field = delivery.field
        logger.warning("task %s lost its worker before: it runs alone among such", field)

        def then(end: Callable[..., Any]) -> Callable[..., Any]:
            def ended(*args: Any) -> None:
                end(*args)
                self.call_soon(self._next, field)

            return ended

        self._hand_on(delivery, then(delivery.ack), then(delivery.reject))

    def _next(self, field: str) -> None:
        if self._alone == field:
            self._alone = None
        while self._alone is None and self._suspects:  # one may have come to its end, or wait
            self._look_at(self._suspects.popleft())

    def _hand_on(
        self, delivery: _Delivery, ack: Callable[..., Any], reject: Callable[..., Any]
    ) -> None:
        message = delivery.message
        try:
            delivery.handle(message, delivery.body, ack, reject, delivery.callbacks)
        except AWAY:
            self._next(delivery.field)
            raise
        except Exception as error:
            self._refuse(message, InvalidTaskError(repr(error)))
            self._next(delivery.field)

    def _end(self, delivery: _Delivery, starts: int) -> None:
        """The worker died each time it ran: it ends as a failure, and is kept."""
        error = PoisonError(starts)
        if not burial.bury(self.app, delivery.message, "poison", error):
            return self._wait(delivery)
        self._go_on(delivery)
        request = Request(
            delivery.message, app=self.app, task=delivery.task, hostname=self.hostname,
            on_ack=delivery.ack, on_reject=delivery.reject, eventer=self.event_dispatcher,
            connection_errors=self.connection_errors,
        )  # fmt: skip
        logger.error("task %s: %s", delivery.field, error)
        delivery.ends = starts  # whatever becomes of its record, it does not run again
        fail(request, error)
        request.acknowledge()
        return None


def fail(request: Request, error: Exception) -> None:
    """End a task that does not run, as Celery's worker ends one whose process it lost."""
    request.task.backend.mark_as_failure(
        request.id, error, request=request._context, store_result=request.store_errors
    )
    announce(request, error)


def announce(request: Request, error: Exception) -> None:
    """Tell of a failure that is stored."""
    task = request.task
    try:
        raise error
    except type(error):
        info = ExceptionInfo()
    signals.task_failure.send(
        sender=task, task_id=request.id, exception=error, args=request.args, kwargs=request.kwargs,
        traceback=None, einfo=info,
    )  # fmt: skip
    request.send_event("task-failed", exception=repr(error), traceback="")


def _replies(message: Message) -> dict[str, Any]:
    names = ("correlation_id", "reply_to")
    return {name: message.properties.get(name) for name in names}


def runs_here(field: str) -> bool:
    return any(runs.field_of(request) == field for request in worker_state.active_requests)
