"""A few threads that publish where the broker cannot be reached from the event loop.

RabbitMQ and the other brokers of kombu block, and so does whatever writes to a result backend, as a
chord does. A call that waits for its turn until its deadline is never sent; one that is being sent
has connections whose every wait ends with its deadline, so that the thread is soon free again.
"""

import asyncio
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, finalize

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError, SerializationError
from kombu.messaging import Producer
from redis.exceptions import RedisError

from celeriac import rabbitmq
from celeriac.errors import PublishError

_THREADS = 4
_IDLE = 5.0  # seconds without work after which a thread ends, and its connections with it
_WAITING = 10_000  # calls; more would not get their turn before their deadlines

SILENT = "the broker did not answer until the deadline"


class _Job:
    def __init__(
        self, app: Celery, send: Callable[["Sender"], Any], timeout: float, context: Context
    ) -> None:
        self.app, self.send, self.context = app, send, context
        # Celery keeps one for each thread, and results belong to that of who waits for them.
        self.backend = app.backend
        self.timeout, self.deadline = timeout, time.monotonic() + timeout
        self.future: Future[Any] = Future()
        self.sending = False  # from here on the broker may have taken it

    def run(self, senders: WeakKeyDictionary[Celery, "Sender"]) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            sender = senders.get(self.app)
            if sender is None or sender.limit < self.timeout:
                if sender is not None:
                    sender.close()
                sender = senders[self.app] = Sender(self.app, self.timeout)
            self.future.set_result(self.context.run(self._run, sender))
        except BaseException as error:
            self.future.set_exception(error)

    def _run(self, sender: "Sender") -> Any:
        _sender.set((self.app, sender))
        sender.job = self
        self.app._backend = self.backend
        try:
            return self.send(sender)
        finally:
            self.app._local.__dict__.pop("backend", None)
            sender.job = None  # which holds the app that the sender shall end with


class Sender:
    """One thread's connection to one app's broker, in the place of the app's own producer pool."""

    def __init__(self, app: Celery, limit: float) -> None:
        self.limit = limit
        self.job: _Job | None = None
        self._connection = app.connection_for_write()
        _limit(self._connection, limit)
        self.connections = SimpleNamespace(connection=self._connection)
        self.producer = _Producer(self, self._connection)
        # With the app, which it must not keep alive: a thread may be idle for long.
        self._end = finalize(app, _close, self._connection, limit)
        self._end.atexit = False

    def acquire(self, block: bool = False, timeout: float | None = None) -> Producer:
        return self.producer

    def connect(self) -> float:
        """Make sure of a connection; the seconds that are left."""
        assert self.job is not None
        connection, deadline = self._connection, self.job.deadline
        if connection.connected and _is_stale(connection):
            connection.collect()
        if not connection.connected:
            left = deadline - time.monotonic()
            tries = max(1, len(connection.alt))
            connection.connect_timeout = max(left / tries, 0.01)
            connection.ensure_connection(
                max_retries=tries, interval_start=0, interval_step=0, interval_max=0, timeout=left
            )
            self.producer.revive(connection)
        _ = self.producer.channel  # opened by a round trip, on RabbitMQ
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(SILENT)
        return left

    @contextmanager
    def broken_by_errors(self) -> Iterator[None]:
        """Drop the connection on any error but one that came before it was used."""
        connection = self._connection
        broker = connection.connection_errors + connection.recoverable_channel_errors
        try:
            yield
        except SerializationError:
            raise
        except BaseException as error:
            with suppress(Exception):
                connection.collect(self.limit)
            if isinstance(error, (OperationalError, OSError, *broker)):
                assert self.job is not None
                raise PublishError(
                    str(error) or repr(error), maybe_accepted=self.job.sending
                ) from error
            raise

    def close(self) -> None:
        self._end()


def _close(connection: Connection, seconds: float) -> None:
    with suppress(Exception):  # whatever a broker's library raises about a lost connection
        connection.collect(seconds)
    with suppress(Exception):
        connection.release()


class _Producer(Producer):
    """Sends once, over a connection that was just seen alive: a second time might double a task."""

    def __init__(self, sender: Sender, connection: Connection) -> None:
        self._sender = sender
        super().__init__(connection)

    def publish(self, body: Any, *args: Any, **options: Any) -> Any:
        assert self._sender.job is not None
        send = partial(self._publish_once, super().publish, body, *args, **options)
        with self._sender.broken_by_errors():
            return rabbitmq.publish(self._sender.job.app, self, send, options.get("exchange"))

    def _publish_once(self, publish: Any, *args: Any, **options: Any) -> Any:
        left = self._sender.connect()
        assert self._sender.job is not None
        self._sender.job.sending = True
        options |= {"retry": False, "timeout": left, "confirm_timeout": left}
        return publish(*args, **options)


def _limit(connection: Connection, seconds: float) -> None:
    """Let none of the connection's own waits last longer."""
    options = dict(connection.transport_options or {})
    names: tuple[str, ...] = ()
    if connection.transport_cls in ("amqp", "amqps", "pyamqp"):
        names = ("read_timeout", "write_timeout")
    elif connection.transport_cls in ("redis", "rediss", "sentinel"):
        names = ("socket_timeout", "socket_connect_timeout")
    for name in names:
        options[name] = min(options.get(name) or seconds, seconds)
    connection.transport_options = options


def _is_stale(connection: Connection) -> bool:
    """Whether a server that owes nothing has spoken: it closes, or has closed, the connection."""
    if connection.transport.driver_type != "amqp":
        return False  # redis-py looks itself
    try:
        return bool(select.select([connection.connection.sock], [], [], 0)[0])
    except (OSError, ValueError, AttributeError):
        return True


_sender: ContextVar[tuple[Celery, Sender] | None] = ContextVar("celeriac_sender", default=None)


def sender(app: Celery) -> Sender | None:
    """That of `app` inside a call of `run`: a chain or a chord gives its messages no producer."""
    here = _sender.get()
    return here[1] if here is not None and here[0] is app else None


class _Threads:
    """This process's threads, started when there is work and none of them idle."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._condition = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closing = False

    def submit(self, job: _Job) -> None:
        with self._condition:
            if len(self._jobs) >= _WAITING:
                raise PublishError("too many calls wait for the broker")
            self._jobs.append(job)
            if self._idle >= len(self._jobs) or len(self._threads) >= _THREADS:
                self._condition.notify()
                return
            thread = threading.Thread(target=self._work, name="celeriac-publish", daemon=True)
            self._threads.add(thread)
            thread.start()

    def close(self, timeout: float) -> None:
        with self._condition:
            self._closing, threads = True, list(self._threads)
            self._condition.notify_all()
        for thread in threads:
            thread.join(timeout)
        self._closing = False

    def give_up(self, job: _Job) -> None:
        with self._condition, suppress(ValueError):
            self._jobs.remove(job)

    def _work(self) -> None:
        senders: WeakKeyDictionary[Celery, Sender] = WeakKeyDictionary()
        try:
            while (job := self._next()) is not None:
                job.run(senders)
                del job  # and its app, whose last reference it may be
        finally:
            for sender in list(senders.values()):
                sender.close()

    def _next(self) -> _Job | None:
        with self._condition:
            self._idle += 1
            self._condition.wait_for(lambda: self._jobs or self._closing, _IDLE)
            self._idle -= 1
            if not self._jobs:
                self._threads.discard(threading.current_thread())
                return None
            return self._jobs.popleft()


_threads = _Threads()


def close(timeout: float = 1.0) -> None:
    """End the threads that are idle, and close their connections; the next call starts new ones."""
    _threads.close(timeout)


async def run(app: Celery, send: Callable[[Sender], Any], timeout: float, context: Context) -> Any:
    """What `send` gives, run by a thread in `context`. Raises PublishError at the deadline."""
    job = _Job(app, send, timeout, context)
    _threads.submit(job)
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(job.future)
    except (OperationalError, RedisError, OSError) as error:  # a result backend's, or the deadline
        reason = SILENT if isinstance(error, TimeoutError) else str(error)
        raise PublishError(reason, maybe_accepted=job.sending) from error
    finally:
        if job.future.cancel():
            _threads.give_up(job)
