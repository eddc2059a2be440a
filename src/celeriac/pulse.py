"""A worker's report on itself, for `celeriac health`: a thread looks at what the main loop does."""

import atexit
import logging
import threading
import time
from contextlib import suppress
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.exceptions import ChannelError

from celeriac import bridge
from celeriac.health import EVERY, HealthError, Report

logger = logging.getLogger(__name__)

_LOOK_EVERY = 3.0
_LOOKS = 3  # in a row that find messages waiting, and none taken
_LIMITS = {  # by kombu's names of drivers: no broker is waited for any longer
    "redis": {"socket_timeout": 2.0, "socket_connect_timeout": 2.0},
    "amqp": {"read_timeout": 2.0, "write_timeout": 2.0},
}


class Pulse(bootsteps.StartStopStep):  # type: ignore[misc]
    """The worker's step that starts the thread."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._stopping = False
        self._turned = self._loop_turned = time.monotonic()
        self._asked = self._loop_asked = False

    def start(self, worker: Any) -> None:
        try:
            self._report = Report("worker", worker.hostname)
        except (HealthError, OSError) as error:
            logger.warning("`celeriac health worker` will find nothing: %s", error)
            return
        self._look = _Look(worker)
        atexit.register(self._report.remove)
        threading.Thread(
            target=self._beat, args=(worker,), name="celeriac-health", daemon=True
        ).start()

    def stop(self, worker: Any) -> None:
        # The thread goes on: a worker that waits for its last tasks is alive.
        self._stopping = True

    terminate = stop

    def _beat(self, worker: Any) -> None:
        while worker.blueprint.state != bootsteps.TERMINATE:
            try:
                self._ask(worker)
                self._report.write(self._reason(worker), **self._times(worker))
            except OSError as error:  # a full disk, say: silence is what is noticed
                logger.warning("the report for `celeriac health` was not written: %s", error)
            except Exception:
                logger.exception("the report for `celeriac health` was not made")
            time.sleep(EVERY)
        self._report.remove()

    def _ask(self, worker: Any) -> None:
        """Have both loops, where there are, note that they turn."""
        if not self._asked and worker.consumer is not None:
            self._asked = True
            worker.consumer.call_soon(self._note_turn)
        if not self._loop_asked and _hosts_tasks(worker.pool):
            self._loop_asked = True
            bridge.loop().call_soon_threadsafe(self._note_loop_turn)

    def _note_turn(self) -> None:
        self._turned, self._asked = time.monotonic(), False

    def _note_loop_turn(self) -> None:
        self._loop_turned, self._loop_asked = time.monotonic(), False

    def _times(self, worker: Any) -> dict[str, float]:
        times = {}
        if _hosts_tasks(worker.pool):
            times["loop"] = self._loop_turned
        # Where the main thread has a reason to be elsewhere, its loop is not missed.
        if not (self._stopping or _away(worker) or _runs_a_task_itself(worker)):
            times["turned"] = self._turned
        else:
            self._asked = False
            self._turned = time.monotonic()
        return times

    def _reason(self, worker: Any) -> str:
        """Why the worker takes no tasks; empty if it does."""
        if self._stopping:
            return "it is shutting down"
        return _away(worker) or _consumes_nothing(worker.consumer) or self._look.found


def _hosts_tasks(pool: Any) -> bool:
    return type(pool).__module__ == "celeriac.pool"


def _runs_a_task_itself(worker: Any) -> bool:
    solo = type(worker.pool).__module__ == "celery.concurrency.solo"
    return solo and bool(state.active_requests)


def _away(worker: Any) -> str:
    consumer = worker.consumer
    if consumer is None or consumer.connection is None or not consumer.connection.connected:
        return "it is not connected to the broker"
    return ""


def _consumes_nothing(consumer: Any) -> str:
    tasks = consumer.task_consumer
    if tasks is None:
        return "it does not consume yet"
    channel = tasks.channel
    if channel is None or getattr(channel, "closed", False) or channel.connection is None:
        return "its channel is closed"
    if not any(tasks.consuming_from(queue) for queue in list(tasks.queues)):
        return "it consumes no queue"
    return ""


class _Look:
    """Whether messages wait in the worker's queues that it has room for, and does not take."""

    def __init__(self, worker: Any) -> None:
        self.found = ""
        self._worker = worker
        self._idle = 0
        self._seen: tuple[int, int] | None = None
        self._connection: Any = None
        # A thread of its own: a broker may not answer for long, and the report must go on.
        threading.Thread(target=self._turn, name="celeriac-health-look", daemon=True).start()

    def _turn(self) -> None:
        while self._worker.blueprint.state != bootsteps.TERMINATE:
            time.sleep(_LOOK_EVERY)
            try:
                self.found = self._look()
            except Exception as error:
                self._disconnect()
                self.found = f"the broker does not answer: {error}"
        self._disconnect()

    def _look(self) -> str:
        consumer = self._worker.consumer
        seen = state.all_total_count[0], len(state.requests)
        busy, self._seen = seen != self._seen, seen
        if busy or _away(self._worker) or _consumes_nothing(consumer) or not _has_room(consumer):
            self._idle = 0
            return ""
        waiting = self._waiting(consumer)
        self._idle = self._idle + 1 if waiting else 0
        return f"messages wait in {waiting} and it takes none" if self._idle >= _LOOKS else ""

    def _waiting(self, consumer: Any) -> str:
        try:
            return self._ask(consumer)
        except Exception:  # the connection was idle for long; a new one, or the broker is away
            self._disconnect()
            return self._ask(consumer)

    def _ask(self, consumer: Any) -> str:
        if self._connection is None:
            driver = consumer.connection.transport.driver_type
            options = _LIMITS.get(driver, {}) | (consumer.app.conf.broker_transport_options or {})
            self._connection = consumer.app.connection_for_read(transport_options=options)
        for queue in list(consumer.task_consumer.queues):
            # An error closes a channel; on Redis there is no queue without a message.
            with self._connection.channel() as channel, suppress(ChannelError):
                if channel.queue_declare(queue.name, passive=True).message_count:
                    return str(queue.name)
        return ""

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()


def _has_room(consumer: Any) -> bool:
    limit = consumer.qos.value
    channel = getattr(consumer.task_consumer.channel, "qos", None)
    mine: bool = channel is None or channel.can_consume()
    return mine and (not limit or len(state.requests) < limit)
