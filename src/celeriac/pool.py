"""A worker pool that runs thousands of `async def` tasks at once on the process's event loop.

`worker_pool = "celeriac.pool:TaskPool"`. Celery's own tracer runs each task, inside a greenlet of
an asyncio task (see `bridge`), so that a body that waits costs no thread. Synchronous bodies run in
threads.

The consumer keeps the main thread, and only that thread touches the pool's state and the broker:
a reconnect never stalls the loop, and a body that blocks the loop never loses the connection.
"""

import asyncio
import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from weakref import ref

from billiard.einfo import ExceptionInfo
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import celeryd_init, worker_init
from celery.worker import state as worker_state
from celery.worker.request import Request

from celeriac import bridge
from celeriac.bell import Bell
from celeriac.executor import DaemonThreads
from celeriac.task import is_async

logger = logging.getLogger(__name__)

DEFAULT_CONCURRENCY = 100  # tasks at once where nobody says how many
_MOST_THREADS = 100  # for synchronous bodies
_LOOK_EVERY = 0.5
_PYTHONS_THRESHOLDS = (700, 2000)  # up to 3.12, and since
_THRESHOLD = 10_000  # objects, more than what is on its way with a hundred tasks
_TRACER_ARGUMENTS = 6  # task, id, request, body, content type, content encoding


def _look_for_less_garbage() -> None:
    """Have Python look for cycles seldom.

    What is imported by now stays: looking through it with each few hundred tasks is a sixth of what
    a small one costs. Another sixth is that a turn of the consumer brings a hundred messages, some
    thousand objects that are no garbage, which Python would look through eight times.
    """
    gc.collect()
    gc.freeze()
    first, *others = gc.get_threshold()
    if first in _PYTHONS_THRESHOLDS:  # nobody has chosen one
        gc.set_threshold(_THRESHOLD, *others)


class _JobPid(int):
    """This process's id as a request keeps it, and gives it back to say which job to end."""

    job: "ref[Job]"  # the request that holds this number is held by the job


@dataclass(slots=True, weakref_slot=True, eq=False)
class Job:
    """One task on its way through the pool. Celery holds it, weakly, as the pool's result."""

    name: str
    hosted: bridge.Hosted
    is_async: bool
    callback: Callable[..., Any]
    error_callback: Callable[..., Any]
    accept_callback: Callable[..., Any]
    timeout_callback: Callable[..., Any]
    soft_limit: float | None
    hard_limit: float | None
    terminated: Callable[["Job"], None]
    started: bool = False
    revoked: bool = False
    number: int = 0  # in the order of arrival
    asyncio_task: asyncio.Task[None] | None = None

    def terminate(self, signal: int | None = None) -> None:
        """Called by Celery's request when it is revoked, cancelled or out of time."""
        self.terminated(self)


class TaskPool(BasePool):  # type: ignore[misc]
    """Celery's pool interface over one event loop: `concurrency` tasks at once.

    What happens on the loop comes to the main thread through the hub; where the broker's transport
    has none, the lock is what keeps the pool's state whole.
    """

    limit: int
    patience = bridge.PATIENCE  # with cancelled bodies, before the process ends without them
    signal_safe = False
    body_can_be_buffer = True

    def on_start(self) -> None:
        self._loop = bridge.loop()
        self._context = copy_context()
        self._threads = DaemonThreads(_MOST_THREADS, "celeriac-task")  # the limit may grow
        self._hub: Any = None
        self._lock = threading.RLock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._bell = Bell(self._answer)
        self._something_ended = threading.Event()
        self._running: set[Job] = set()
        self._threads_used = 0
        self._arrived = count()
        self._waiting: deque[Job] = deque()
        self._waiting_for_thread: deque[Job] = deque()
        self._is_async: dict[str, bool] = {}
        self._told: set[str] = set()
        self._warn_of_limits()
        _look_for_less_garbage()

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub
        self._bell.hang_in(hub)

    def _warn_of_limits(self) -> None:
        names = [
            name
            for name, task in sorted(self.app.tasks.items())
            if not name.startswith("celery.")
            and any(self._limits(task.soft_time_limit, task.time_limit))
            and not self._task_is_async(name)
        ]
        if names:
            logger.warning(_UNKEPT_LIMITS, ", ".join(names))
            self._told.update(names)

    def _limits(self, soft: float | None, hard: float | None) -> tuple[float | None, float | None]:
        return soft or self.options.get("soft_timeout"), hard or self.options.get("timeout")

    def _task_is_async(self, name: str) -> bool:
        if name not in self._is_async:
            self._is_async[name] = name in self.app.tasks and is_async(self.app.tasks[name])
        return self._is_async[name]

    # From here to the next such line: on the main thread.

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        *,
        callback: Callable[..., Any] = lambda *_: None,
        error_callback: Callable[..., Any] = lambda *_: None,
        accept_callback: Callable[..., Any] = lambda *_: None,
        timeout_callback: Callable[..., Any] = lambda *_: None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        correlation_id: str | None = None,
        **_: Any,
    ) -> Job:
        name = str(args[0]) if args else ""
        job = Job(
            f"{name}[{correlation_id}]",
            bridge.Hosted(partial(target, *_decoded(args, accept_callback), **kwargs)),
            self._task_is_async(name),
            callback,
            error_callback,
            accept_callback,
            timeout_callback,
            *self._limits(soft_timeout, timeout),
            terminated=self._terminate,
        )
        if self._state != self.RUN:
            return job  # never started, so never acknowledged: the broker gives it to another
        if not job.is_async and any((job.soft_limit, job.hard_limit)) and name not in self._told:
            self._told.add(name)
            logger.warning(_UNKEPT_LIMITS, name)
        with self._lock:
            job.number = next(self._arrived)
            (self._waiting if job.is_async else self._waiting_for_thread).append(job)
            self._start_waiting()
        return job

    def _start_waiting(self) -> None:
        while len(self._running) < self.limit:
            threads = self._waiting_for_thread if self._threads_used < _MOST_THREADS else ()
            first = [waiting for waiting in (self._waiting, threads) if waiting]
            if not first:
                return
            # In the order of arrival: those of one kind must not keep the other waiting for ever.
            self._begin(min(first, key=lambda waiting: waiting[0].number).popleft())

    def _begin(self, job: Job) -> None:
        job.started = True
        pid = _JobPid(os.getpid())
        pid.job = ref(job)
        self._running.add(job)
        self._threads_used += not job.is_async
        self._tell(job, partial(job.accept_callback, pid, time.monotonic()))
        if job.revoked:  # while it waited; accepting it told everybody
            self._end(job, None)
        elif job.is_async:
            self._loop.call_soon_threadsafe(self._spawn, job)
        else:
            self._threads.submit(self._call, job)

    def _end(self, job: Job, tell: Callable[[], None] | None) -> None:
        self._running.discard(job)
        self._threads_used -= not job.is_async
        try:
            if tell is not None:
                self._tell(job, tell)
        finally:
            self._start_waiting()

    def _tell(self, job: Job, tell: Callable[[], None]) -> None:
        """Celery writes to the broker and the result backend; no error may end the main loop."""
        try:
            tell()
        except Exception:
            logger.exception("what happened to %s was not noted", job.name)

    def _terminate(self, job: Job) -> None:
        job.revoked = True
        if not job.started:
            with self._lock:
                for waiting in (self._waiting, self._waiting_for_thread):
                    if job in waiting:
                        waiting.remove(job)
                        self._begin(job)
        elif job.is_async:
            self._loop.call_soon_threadsafe(self._stop, job)
        elif job in self._running:
            logger.warning(
                "%s runs on: a thread cannot be interrupted; to end synchronous tasks, run them "
                'in a worker with worker_pool = "prefork"',
                job.name,
            )

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        if isinstance(pid, _JobPid) and (job := pid.job()) is not None:
            self._terminate(job)

    def grow(self, n: int = 1) -> None:
        with self._lock:
            self.limit += n
            self._start_waiting()

    def shrink(self, n: int = 1) -> None:
        self.limit = max(1, self.limit - n)

    def flush(self) -> None:
        """Forget what waits: the connection that it came over is lost, it will come again."""
        with self._lock:
            self._waiting.clear()
            self._waiting_for_thread.clear()

    def on_close(self) -> None:
        self.flush()

    def on_stop(self) -> None:
        """Wait until what runs has ended; in a cold shutdown, what can still be ended."""
        self._state = self.CLOSE
        self.flush()
        if worker_state.should_terminate not in (None, False):  # it may be 0, an exit code
            self.on_terminate()
            return
        while self._running:
            # Acknowledgements go out and heartbeats beat while the last tasks run.
            if self._hub is not None and self._hub.readers:
                self._turn_hub()
            else:
                self._wait(_LOOK_EVERY)
        self._threads.shutdown()

    def _turn_hub(self) -> None:
        try:
            self._hub.run_once()
        except Exception as error:
            logger.warning("the broker is away while the last tasks run: %s", error)
            self._hub.reset()

    def _wait(self, timeout: float) -> None:
        self._something_ended.wait(timeout)
        self._something_ended.clear()
        self._answer()

    def on_terminate(self) -> None:
        """End every body, and give those that clean up a moment."""
        for job in self._running:
            if job.is_async:
                self._loop.call_soon_threadsafe(self._stop, job)
        deadline = time.monotonic() + self.patience
        while self.has_bodies:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._wait(left)
        self._threads.shutdown()

    @property
    def has_bodies(self) -> bool:
        """Whether any runs on the loop; threads do not count."""
        return any(job.is_async for job in self._running)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        soft, hard = self._limits(None, None)
        info |= {  # in the shape of prefork's, which Flower and others read
            "max-concurrency": self.limit,
            "processes": [os.getpid()],
            "max-tasks-per-child": "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": (soft or 0, hard or 0),
            "writes": "N/A",
            "running": len(self._running),
            "threads": self._threads.count,
        }
        return info

    # From here on: on the loop's thread, or on that of a synchronous task.

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        """Have `callback` called on the main thread, which may be busy reconnecting."""
        if self._hub is None:
            with self._lock:
                callback(*args)
            self._something_ended.set()
            return
        self._inbox.append(partial(callback, *args))
        self._something_ended.set()
        self._bell.ring()

    def _answer(self) -> None:
        while self._inbox:
            try:
                callback = self._inbox.popleft()
            except IndexError:
                return  # a signal handler was quicker
            callback()

    def _spawn(self, job: Job) -> None:
        context = self._context.copy()
        try:
            traced = self._loop.create_task(self._trace(job), name=job.name, context=context)
        except BaseException:  # without memory for it; it must not run for ever
            self._post(self._end, job, partial(job.error_callback, ExceptionInfo()))
        else:
            job.asyncio_task = traced

    async def _trace(self, job: Job) -> None:
        timers = []
        if job.soft_limit:
            timers.append(self._loop.call_later(job.soft_limit, self._out_of_soft_time, job))
        if job.hard_limit:
            timers.append(self._loop.call_later(job.hard_limit, self._out_of_time, job))
        try:
            value = await job.hosted.run()
            tell: Callable[[], None] | None = partial(job.callback, value)
        except BaseException:
            # Whoever stopped it has told the request; the tracer has stored nothing.
            tell = None if job.hosted.stopped else partial(job.error_callback, ExceptionInfo())
        for timer in timers:
            timer.cancel()
        self._post(self._end, job, tell)

    def _call(self, job: Job) -> None:
        try:
            tell = partial(job.callback, job.hosted.function())
        except BaseException:
            tell = partial(job.error_callback, ExceptionInfo())
        self._post(self._end, job, tell)

    def _stop(self, job: Job) -> bool:
        if stopped := job.hosted.stop():
            self._loop.call_later(bridge.PATIENCE, self._tell_of_stubborn, job)
        return stopped

    def _tell_of_stubborn(self, job: Job) -> None:
        if job.asyncio_task is not None and not job.asyncio_task.done():
            logger.error("%s was cancelled %g s ago and does not end", job.name, bridge.PATIENCE)

    def _out_of_soft_time(self, job: Job) -> None:
        if job.hosted.in_body and not job.hosted.stopped:
            job.hosted.throw(SoftTimeLimitExceeded(job.soft_limit))
            self._post(self._tell, job, partial(job.timeout_callback, True, job.soft_limit))

    def _out_of_time(self, job: Job) -> None:
        if self._stop(job):
            self._post(self._tell, job, partial(job.timeout_callback, False, job.hard_limit))


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _default_concurrency(instance: Any, options: Mapping[str, Any], **_: Any) -> None:
    """Tasks at once cost no processor each here: Celery's default is the processors' number."""
    if options.get("concurrency") or instance.app.conf.worker_concurrency:
        return

    def replace(sender: Any, **_: Any) -> None:
        if get_implementation(sender.pool_cls) is TaskPool:
            sender.concurrency = DEFAULT_CONCURRENCY

    # The command line has put Celery's default into the options by now: it is replaced later.
    worker_init.connect(replace, sender=instance, weak=False)


def _decoded(args: Sequence[Any], accepted: Callable[..., Any]) -> Sequence[Any]:
    """The tracer's arguments with the body that Celery's request has decoded already.

    Other pools send it to another process; the tracer takes it either way.
    """
    request = getattr(accepted, "__self__", None)
    if len(args) != _TRACER_ARGUMENTS or not isinstance(request, Request) or not args[4]:
        return args
    return (*args[:3], request.message.payload, None, None)


_UNKEPT_LIMITS = (
    "these synchronous tasks run in threads, which cannot be interrupted, so their time limits are "
    "not kept here: %s; run them in a worker whose worker_pool is prefork"
)
