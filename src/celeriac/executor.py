"""Threads for what would block an event loop."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class DaemonThreads(Executor):
    """Up to `limit` threads, made as they are needed, that do not hold up the process's end.

    Python's own ThreadPoolExecutor joins its threads at exit, however long they block.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit, self._name = limit, name
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self.count = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self.count < self._limit:
                self.count += 1
                name = f"{self._name}-{self.count}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        self._waiting.put(call)
        return future

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            call()
            del call  # or it would keep its arguments and result until the next one
            with self._lock:
                if self._waiting.empty():
                    self._idle += 1

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """End the threads when what was submitted is done; nobody waits for that."""
        for _ in range(self.count):
            self._waiting.put(None)
