"""How a worker ends: it finishes what fits in the grace period and gives the rest back.

A first SIGTERM or SIGINT begins the shutdown: no message is taken any more, and those that were not
begun go back to their queues. What runs has `worker_soft_shutdown_timeout` seconds (0: for ever).
A second signal, or SIGQUIT, or the end of that time, cuts off what still runs, and writes what
becomes of it: what was not acknowledged waits again, what was has failed.

The main thread does this, in a bootstep. A thread beside it sees to the time, and ends the process
where the main thread cannot, as when it waits for a server that is away: what others hold by a
lease, or a broker by its connection, is theirs to give back then.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from billiard.common import REMAP_SIGTERM
from billiard.exceptions import WorkerLostError
from celery import Celery, bootsteps, signals
from celery._state import get_current_task
from celery.apps.worker import Worker, install_worker_term_handler, safe_say
from celery.exceptions import WorkerTerminate
from celery.platforms import EX_FAILURE, EX_OK
from celery.utils.threads import bound_open_broker_sockets
from celery.worker import state as worker_state
from celery.worker.request import Request
from kombu.message import Message

from celeriac import delivery, ending, lease, lifespan, runs

logger = logging.getLogger(__name__)

_AFTERWARDS = 1.6  # seconds from the end of the grace period to that of the process
_PATIENCE = 0.8  # of these, for bodies that are cut off to clean up
_FOR_OTHERS = 0.4  # of these, for the least where the rest did not fit
_LEAVING = 12.0  # after these, for the lifespan
_SILENCE = 1.0  # seconds in which a broker has to answer
_LOOK_EVERY = 0.2
_MOST_SIGNALS = 2  # of those after which what runs is cut off; one more ends the process at once


class Shutdown(bootsteps.StartStopStep):  # type: ignore[misc]
    """Ends before the pool does, and after the consumer has stopped."""

    requires = ("celery.worker.components:Pool",)
    label = "celeriac shutdown"

    def __init__(self, worker: Any, **_: Any) -> None:
        self._worker = worker
        self._news: SimpleQueue[None] = SimpleQueue()  # which a signal handler may put into
        self._begun = False
        self._cuts = 0  # how often it was asked to be quick
        self._over = False  # with the tasks
        self._settled = False  # what becomes of them
        self._main = threading.get_ident()

    def include_if(self, worker: Any) -> bool:
        program = isinstance(worker, Worker) and threading.current_thread() is (
            threading.main_thread()
        )
        return program and ending.kind_of(worker.pool_cls) is not None

    def start(self, worker: Any) -> None:
        self._pool = ending.kind_of(worker.pool_cls)(worker.pool)  # type: ignore[misc]
        self._grace = worker.app.conf.worker_soft_shutdown_timeout or None
        # As late as can be: Python would let a signal during its own end kill the process.
        atexit.register(_hear_no_more)
        threading.Thread(target=self._guard, name="celeriac-shutdown", daemon=True).start()
        self._await("SIGINT")
        # As Celery has it: without a grace period such a SIGTERM is a SIGQUIT.
        if REMAP_SIGTERM == "SIGQUIT" and self._grace is None:
            self._await_another("SIGTERM")
        else:
            self._await("SIGTERM")
        self._await_another("SIGQUIT")

    # Celery's handlers say what was heard, and set the flag that its main loop looks for.

    def _await(self, name: str) -> None:
        install_worker_term_handler(
            self._worker, sig=name, how="Warm", callback=self._first, exitcode=EX_OK
        )

    def _await_another(self, name: str) -> None:
        install_worker_term_handler(
            self._worker, sig=name, how="Cold", callback=self._another, exitcode=EX_OK
        )

    def _first(self, _: Any = None) -> None:
        self._begun = True
        for name in ("SIGTERM", "SIGINT"):
            self._await_another(name)
        self._news.put(None)

    def _another(self, _: Any) -> None:
        self._begun = True
        self._cuts += 1
        self._news.put(None)
        if self._pool.runs_here and get_current_task() is not None:
            raise WorkerTerminate(EX_OK)  # into the body

    # In a thread of its own.

    def _guard(self) -> None:
        self._news.get()
        self._wake()
        if not self._cuts:
            try:
                self._news.get(timeout=self._grace)
            except Empty:
                if not self._over:
                    signal.pthread_kill(self._main, signal.SIGQUIT)
        self._wake()
        self._listen(_AFTERWARDS - _FOR_OTHERS)
        if not self._over:
            # No logging, whose lock the main thread may hold.
            safe_say("worker: the shutdown takes too long: the rest is for others", sys.__stderr__)
            threading.Thread(target=self._leave_to_others, daemon=True).start()
        self._listen(_FOR_OTHERS)
        if lifespan.is_leaving():  # which ends by itself
            self._listen(_LEAVING)
        os._exit(EX_FAILURE if self._cuts > _MOST_SIGNALS else EX_OK)

    def _listen(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while self._cuts <= _MOST_SIGNALS and (left := ends - time.monotonic()) > 0:
            with suppress(Empty):
                self._news.get(timeout=left)

    def _leave_to_others(self) -> None:
        known = runs.of(self._worker.app)
        if known is not None and not self._settled:
            with suppress(Exception):
                known.give_up()
        lease.process.stop()

    def _wake(self) -> None:
        if self._worker.hub is not None:
            self._worker.hub.call_soon(int)

    # From here on: in the main thread.

    def close(self, worker: Any) -> None:
        """Take nothing any more, and give back what was not begun."""
        if not self._begun:  # no signal, but remote control or an error
            self._first()
        consumer = worker.consumer
        if getattr(consumer, "connection", None) is not None:
            bound_open_broker_sockets(consumer.connection, _SILENCE)
        else:
            self._mend_hub()
        self._take_no_more(consumer)
        if worker.hub is not None:
            worker.hub.call_repeatedly(_LOOK_EVERY, int)  # or a turn may take seconds
        self._pool.close(self._turn)
        waiting = _not_begun(consumer)
        for request in waiting:
            request.acknowledged = True
        messages = [request.message for request in waiting]
        messages += getattr(consumer, "waiting", [])
        _give_back(messages)

    def _take_no_more(self, consumer: Any) -> None:
        if getattr(consumer, "task_consumer", None) is None:
            return
        try:
            consumer.task_consumer.cancel()
        except consumer.connection_errors + consumer.channel_errors as error:
            logger.warning("the broker does not answer: %r", error)
            if consumer.connection is not None:
                consumer.connection.collect(socket_timeout=_SILENCE)
            self._mend_hub()

    def stop(self, worker: Any) -> None:
        """Let what runs end, and cut off what does not."""
        while self._running() and not self._cuts:
            self._turn()
        if cut_off := tuple(worker_state.active_requests):
            self._cut_off(worker, cut_off)
        self._over = True

    def _cut_off(self, worker: Any, cut_off: tuple[Request, ...]) -> None:
        worker_state.should_terminate = True
        self._pool.cut_off(cut_off)
        self._wait(_PATIENCE)
        self._pool.kill()
        self._wait(_LOOK_EVERY)
        try:
            self._settle(worker.app, cut_off)
        except Exception as error:
            logger.warning("what becomes of tasks that were cut off is for others: %r", error)
        if self._pool.leaves_threads:
            self._leave_threads()

    def terminate(self, worker: Any) -> None:
        self._cuts = max(1, self._cuts)
        self.stop(worker)

    def _running(self) -> bool:
        return any(self._pool.runs(request) for request in tuple(worker_state.active_requests))

    def _wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while self._pool.busy and self._cuts < 2 and time.monotonic() < ends:
            self._turn()

    def _turn(self) -> None:
        """What a worker does all the time: results, acknowledgements, heartbeats, time limits."""
        hub = self._worker.hub
        if hub is None:
            self._worker.consumer.perform_pending_operations()
            time.sleep(_LOOK_EVERY / 10)
            return
        try:
            hub.run_once()
        except Exception as error:
            logger.warning("the broker is away while the last tasks run: %s", error)
            self._mend_hub()

    def _mend_hub(self) -> None:
        """Without the broker's connection, which was lost."""
        if self._worker.hub is not None:
            self._worker.hub.reset()
            self._worker.register_with_event_loop(self._worker.hub)

    def _settle(self, app: Celery, cut_off: Iterable[Request]) -> None:
        self._settled = True
        known = runs.of(app)
        failed = known.give_up() if known is not None else set()
        error = WorkerLostError(runs.CUT_OFF)
        returned = []
        for request in cut_off:
            late, field = request.task.acks_late, runs.field_of(request)
            if field in failed:
                delivery.announce(request, error)
            elif (request.acknowledged and late) or request.id in worker_state.successful_requests:
                continue  # it came to its end meanwhile
            elif known is not None and known.over(field):
                request.acknowledge()
            elif request.acknowledged:
                delivery.fail(request, error)
            else:
                request.acknowledged = True
                returned.append(request.message)
        _give_back(returned)
        logger.warning(
            "tasks that were cut off: %d wait again, %d failed", len(returned), len(failed)
        )

    def _leave_threads(self) -> None:
        """End the process, whose threads Python would wait for."""
        worker = self._worker
        logger.warning("threads that run on are left behind")
        self._turn()
        if worker.hub is not None:
            worker.hub.close()
        worker.on_stopped()
        signals.worker_shutdown.send(sender=worker)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(worker.exitcode or EX_OK)


def _hear_no_more() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def _not_begun(consumer: Any) -> list[Request]:
    """Waiting for the pool, for their time, or for their turn by a rate limit."""
    found = list(worker_state.requests.values())
    for bucket in consumer.task_buckets.values():
        if bucket is not None:
            found += [request for request, _ in bucket.contents]
    known = {id(request): request for request in found}
    return [each for each in known.values() if each not in worker_state.active_requests]


def _give_back(messages: Iterable[Message]) -> None:
    """To their queues, at once; where that fails, it is done when the connection is closed."""
    by_channel: dict[Any, list[Any]] = defaultdict(list)
    for message in messages:
        if message.channel is not None and not message.acknowledged:
            by_channel[message.channel].append(message)
    for channel, some in by_channel.items():
        try:
            if hasattr(channel, "requeue"):
                channel.requeue([message.delivery_tag for message in some])
            else:
                for message in some:
                    message.reject(requeue=True)
        except Exception as error:
            logger.warning("%d messages go back later: %r", len(some), error)
