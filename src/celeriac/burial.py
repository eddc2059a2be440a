"""Which messages become dead letters by a worker's hand, and what is said of them."""

import logging
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from celery import Celery, Task, signals
from kombu.exceptions import OperationalError
from kombu.message import Message
from kombu.utils.functional import retry_over_time
from redis.exceptions import RedisError

from celeriac import bridge, dead
from celeriac.errors import DeadLetterError

logger = logging.getLogger(__name__)

_PATIENCE = 30  # seconds in which a server is expected to be back

# The bits that Celery writes before the key of a message that is delayed on RabbitMQ.
_DELAY = re.compile(r"^([01]\.)+")


def identity(message: Message) -> tuple[Any, Any]:
    """The id and the task of a message, whatever they are; Celery's first protocol included."""
    found = message.headers
    if "task" not in found:
        try:
            found = message.payload
        except Exception:  # whatever a decoder raises
            found = {}
    return (found.get("id"), found.get("task")) if isinstance(found, dict) else (None, None)


def _queue_of(app: Celery, delivery_info: Any) -> str | None:
    """The name of the queue that a message came from, as far as its key says it."""
    key = (delivery_info or {}).get("routing_key")
    if not isinstance(key, str):
        return None
    key = _DELAY.sub("", key)
    for queue in list(app.amqp.queues.values()):
        if queue.routing_key == key:
            return str(queue.name)
    return key


def bury(app: Celery, message: Message, reason: str, error: Exception | None) -> bool:
    """Whether it is kept now, as far as there is a place for it."""
    try:
        task_id, task = identity(message)
        text = repr(error) if error is not None else ""
        with dead.letters(app) as kept:
            kept.bury(
                {"id": task_id, "task": task}, dead.message_of(message), reason,
                _queue_of(app, message.delivery_info), text,
            )  # fmt: skip
    except DeadLetterError:
        return True
    except Exception as failed:
        logger.error("a message was not kept as a dead letter: %r", failed)
        return False
    return True


def keep_exhausted(app: Celery) -> None:
    """Keep the messages of tasks that failed with their last retry."""
    _keeps.add(app)
    signals.task_failure.connect(_exhausted, dispatch_uid=f"{__name__}.exhausted")


_keeps: WeakSet[Celery] = WeakSet()


def _exhausted(sender: Task, task_id: str, exception: Exception, **_: Any) -> None:
    request, last = sender.request, sender.max_retries
    if sender.app not in _keeps or request.is_eager or request.id != task_id:
        return
    # `retry` may have been told of another number, which it leaves there.
    if not getattr(request, "celeriac_exhausted", last and last <= (request.retries or 0)):
        return
    bridge.offload(_bury_request, sender, request, exception)


def _bury_request(task: Task, request: Any, error: Exception) -> None:
    def keep() -> None:
        with dead.letters(task.app) as kept:
            kept.bury(headers, raw, "retries", queue, repr(error))

    def wait(failed: Exception, intervals: Iterator[float], _: int) -> float:
        logger.warning("a dead letter waits: %r", failed)
        return next(intervals)

    try:
        raw = dead.message_of_request(task, request)
        queue = _queue_of(task.app, request.delivery_info)
        headers = {"id": request.id, "task": task.name}
        # The task's end is stored and cannot wait for this: its message may be gone already.
        retry_over_time(  # type: ignore[no-untyped-call]
            keep, (OperationalError, RedisError), errback=wait, timeout=_PATIENCE,
            interval_start=0.1, interval_step=0.2, interval_max=1,
        )  # fmt: skip
    except DeadLetterError:
        return
    except Exception:
        logger.exception("task %s was not kept as a dead letter", request.id)
