"""How what runs in a worker is ended, in each of the pools."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from celery.concurrency import prefork, solo, thread
from celery.worker import state as worker_state
from celery.worker.request import Request

from celeriac import bridge
from celeriac.pool import TaskPool

_ACCEPTANCE = 1.0  # seconds for a process to say that it has begun what it was sent


class Ending:
    """Of the tasks in one pool."""

    runs_here = False
    """Whether bodies run in the main thread."""
    leaves_threads = False
    """Whether threads run on that Python would wait for."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def close(self, turn: Callable[[], None]) -> None:
        """Begin nothing any more. `turn` is one of the main loop's."""

    def runs(self, request: Request) -> bool:
        """Whether it may still come to an end."""
        return True

    def cut_off(self, requests: Iterable[Request]) -> None:
        """Begin to end these, which tell nobody how they ended."""
        for request in requests:
            request.cancel(self._pool, emit_retry=False)

    @property
    def busy(self) -> bool:
        """Whether any of these cleans up."""
        return False

    def kill(self) -> None:
        """End what still cleans up."""


class Own(Ending):
    @property
    def busy(self) -> bool:
        return bool(self._pool.has_bodies)

    def kill(self) -> None:
        self._pool.patience = 0.0  # which it has had


class Processes(Ending):
    _pids: frozenset[int] = frozenset()
    _results: Sequence[Any] = ()

    def close(self, turn: Callable[[], None]) -> None:
        # Where it is not known whether a task has begun, two workers would run it.
        ends = time.monotonic() + _ACCEPTANCE
        while any(map(_is_sent, worker_state.reserved_requests)) and time.monotonic() < ends:
            turn()

    def runs(self, request: Request) -> bool:
        return not _is_gone(request.worker_pid)

    def cut_off(self, requests: Iterable[Request]) -> None:
        self._pids = frozenset(self._pool.info["processes"])
        results = [request._apply_result and request._apply_result() for request in requests]
        self._results = [result for result in results if result is not None]
        super().cut_off(requests)
        for pid in self._pids - {request.worker_pid for request in requests}:
            self._pool.terminate_job(pid)

    @property
    def busy(self) -> bool:
        return not all(map(_is_gone, self._pids))

    def kill(self) -> None:
        for pid in self._pids:
            if not _is_gone(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for result in self._results:
            result.discard()  # or the pool would wait for it


def _is_sent(request: Request) -> bool:
    result = request._apply_result
    return request not in worker_state.active_requests and result is not None


def _is_gone(pid: int) -> bool:
    """Of a child, which the pool has not reaped yet."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


class Threads(Ending):
    _end: threading.Thread | None = None

    def close(self, turn: Callable[[], None]) -> None:
        self._pool.executor.shutdown(wait=False, cancel_futures=True)
        turn()  # for those that a thread has just taken

    def cut_off(self, requests: Iterable[Request]) -> None:
        bridge.cancel_awaited()
        self._end = threading.Thread(target=self._pool.executor.shutdown, daemon=True)
        self._end.start()

    @property
    def busy(self) -> bool:
        return self._end is not None and self._end.is_alive()

    @property
    def leaves_threads(self) -> bool:  # type: ignore[override]
        return self.busy


class Solo(Ending):
    runs_here = True

    def cut_off(self, requests: Iterable[Request]) -> None:
        """The signal has done it."""


def kind_of(pool: type) -> type[Ending] | None:
    """How tasks end in a pool of this class; None where only Celery knows."""
    kinds: dict[type, type[Ending]] = {
        TaskPool: Own,
        prefork.TaskPool: Processes,
        thread.TaskPool: Threads,
        solo.TaskPool: Solo,
    }
    return next((kinds[each] for each in pool.__mro__ if each in kinds), None)
