"""How a worker takes in what may have run before, and what no worker should take in again.

A message that comes again is looked up among the runs (see `runs`). While the first run's worker
lives, it waits. Where starts had no end, their worker died of them, or beside them: such a suspect
runs alone among suspects, so that the innocent come to an end, and after `max_deliveries` starts it
is a dead letter.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from billiard.einfo import ExceptionInfo
from celery import Celery, Task, signals, states
from celery.exceptions import InvalidTaskError
from celery.utils.objects import Bunch
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request
from kombu.message import Message
from redis.exceptions import RedisError

from celeriac import bridge, dead, messages, runs
from celeriac.errors import DeadLetterError, PoisonError

logger = logging.getLogger(__name__)

MAX_DELIVERIES = 3
_LOOK_AGAIN = 1.0  # seconds

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

    @property
    def field(self) -> str:
        get = self.message.headers.get
        return f"{get('id')}:{get('retries') or 0}:{get('replaced_task_nesting') or 0}"


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's, which also keeps what it refuses, and looks at what comes again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._suspects: deque[_Delivery] = deque()
        self._alone: str | None = None  # the suspect that runs
        self._connected = 0
        self._waiting: set[_Delivery] = set()
        super().__init__(*args, **options)

    def update_strategies(self) -> None:
        super().update_strategies()
        for name, handle in self.strategies.items():
            self.strategies[name] = partial(self._receive, handle, self.app.tasks[name])

    def create_task_handler(self, *args: Any, **options: Any) -> _Handle:
        handle: _Handle = super().create_task_handler(*args, **options)
        limit = messages.limit_of(self.app)

        def guarded(message: Message) -> Any:
            try:
                messages.check(message, limit)
            except Exception as error:  # whatever a deserializer raises
                return self._refuse(message, error)
            try:
                return handle(message)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                # Written by nobody's Celery: it must not end the worker.
                if message.acknowledged:
                    logger.exception("a message that was refused could not be reported")
                    return None
                return self.on_decode_error(message, error)

        return guarded

    def on_close(self) -> None:
        super().on_close()
        self._suspects.clear()
        self._waiting.clear()  # they come again, over another connection
        self._connected += 1
        if self._alone is not None and not _runs_here(self._alone):
            self._alone = None

    # What Celery drops, or hands back to RabbitMQ, is kept.

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        self._bury(message, "unreadable", exc)
        super().on_decode_error(message, exc)

    def on_unknown_message(self, body: Any, message: Message) -> None:
        self._bury(message, "no task", None)
        super().on_unknown_message(body, message)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        self._bury(message, "unknown task", exc)
        super().on_unknown_task(body, message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        self._bury(message, "invalid", exc)
        super().on_invalid_task(body, message, exc)

    def _refuse(self, message: Message, error: Exception) -> None:
        self.on_invalid_task(None, message, error)
        headers = message.headers if isinstance(message.headers, dict) else {}
        task_id, name = headers.get("id"), headers.get("task")
        if not isinstance(task_id, str) or not isinstance(name, str):
            return
        refusal = InvalidTaskError(str(error))
        request = Bunch(name=name, chord=None, root_id=None, errbacks=None, **_replies(message))
        try:  # somebody may wait for it
            self.app.backend.mark_as_failure(task_id, refusal, request=request)
        except Exception:
            logger.exception("the end of the refused task %s was not recorded", task_id)

    def _bury(self, message: Message, reason: str, error: Exception | None) -> bool:
        return _bury(self.app, message, reason, error)

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
        redelivered = (message.delivery_info or {}).get("redelivered")
        if not redelivered or "id" not in message.headers or runs.of(self.app) is None:
            return handle(message, body, ack, reject, callbacks)
        return self._look(_Delivery(handle, task, message, body, ack, reject, callbacks))

    def _look(self, delivery: _Delivery) -> None:
        known = runs.of(self.app)
        assert known is not None
        field = delivery.field
        try:
            record = known.find(field)
            alive = record is not None and record.holder != known.holder and known.alive(record)
        except RedisError as error:
            logger.warning("whether %s runs elsewhere is not known: %s", field, error)
            return self._wait(delivery)
        if alive or _runs_here(field):
            delivery.contended = True
            return self._wait(delivery)
        if record is None:
            return self._drop(delivery) if self._has_ended(delivery) else self._run(delivery)
        if record.starts >= max_deliveries.get(self.app, MAX_DELIVERIES):
            return self._end(delivery, record.starts)
        if self._alone is None:
            return self._run_alone(delivery)
        self._let_others_by(delivery)
        self._suspects.append(delivery)
        return None

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
        connected = self._connected

        def again() -> None:
            if connected == self._connected:
                self._look(delivery)

        self.timer.call_after(_LOOK_AGAIN, self.call_soon, (again,))

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
        if self._alone is None and self._suspects:
            self._look(self._suspects.popleft())

    def _hand_on(
        self, delivery: _Delivery, ack: Callable[..., Any], reject: Callable[..., Any]
    ) -> None:
        message = delivery.message
        try:
            delivery.handle(message, delivery.body, ack, reject, delivery.callbacks)
        except Exception as error:
            self.on_invalid_task(delivery.body, message, error)
            self._next(delivery.field)

    def _end(self, delivery: _Delivery, starts: int) -> None:
        """The worker died each time it ran: it ends as a failure, and is kept."""
        error = PoisonError(starts)
        if not self._bury(delivery.message, "poison", error):
            return self._wait(delivery)
        self._go_on(delivery)
        request = Request(
            delivery.message, app=self.app, task=delivery.task, hostname=self.hostname,
            on_ack=delivery.ack, on_reject=delivery.reject, eventer=self.event_dispatcher,
            connection_errors=self.connection_errors,
        )  # fmt: skip
        logger.error("task %s: %s", delivery.field, error)
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


def _runs_here(field: str) -> bool:
    return any(runs.field_of(request) == field for request in worker_state.active_requests)


def _bury(app: Celery, message: Message, reason: str, error: Exception | None) -> bool:
    try:
        with dead.letters(app) as kept:
            queue = (message.delivery_info or {}).get("routing_key")
            text = repr(error) if error is not None else ""
            kept.bury(message.headers or {}, dead.message_of(message), reason, queue, text)
    except DeadLetterError:
        return True  # there is no place for them
    except Exception:
        logger.exception("a message was not kept as a dead letter")
        return False
    return True


def keep_exhausted(app: Celery) -> None:
    """Keep the messages of tasks that failed with their last retry."""
    _keeps.add(app)
    signals.task_failure.connect(_exhausted, dispatch_uid=f"{__name__}.exhausted")


_keeps: WeakSet[Celery] = WeakSet()


def _exhausted(sender: Task, task_id: str, exception: Exception, **_: Any) -> None:
    request = sender.request
    last = sender.max_retries
    if sender.app not in _keeps or request.called_directly or request.id != task_id:
        return
    if last is None or not 0 < last <= (request.retries or 0):
        return
    bridge.offload(_bury_request, sender, request, exception)


def _bury_request(task: Task, request: Any, error: Exception) -> None:
    try:
        with dead.letters(task.app) as kept:
            queue = (request.delivery_info or {}).get("routing_key")
            headers = {"id": request.id, "task": task.name}
            kept.bury(
                headers, dead.message_of_request(task, request), "retries", queue, repr(error)
            )
    except DeadLetterError:
        return
    except Exception:
        logger.exception("task %s was not kept as a dead letter", request.id)
