"""The process's event loop and the threads beside it."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import Context
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger(__name__)

_BLOCKED_AFTER = 1.0  # seconds in which nothing else on the loop had its turn
_LOOK_EVERY = 0.25
_CLOSING = 2.0


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


class Bell:
    """Has `answer` called in the next turn of a worker's main loop, rung from any thread.

    kombu's own `call_soon` is no substitute on the main thread: what is added during a turn, as an
    acknowledgement is, would wait for the poll that follows.
    """

    def __init__(self, answer: Callable[[], object]) -> None:
        self._answer = answer
        self._heard, self._rung = socket.socketpair()
        self._heard.setblocking(False)
        self._rung.setblocking(False)
        self._ringing = False

    def hang_in(self, hub: Any) -> None:
        """Listen with `hub`, kombu's; again after each loss of the broker, when it forgets."""
        hub.add_reader(self._heard, self._hear)

    def ring(self) -> None:
        if not self._ringing:
            self._ringing = True
            with suppress(OSError):  # closed, or full: then it is heard anyway
                self._rung.send(b"\0")

    def _hear(self) -> None:
        with suppress(OSError):
            self._heard.recv(4096)
        self._ringing = False
        self._answer()

    def close(self) -> None:
        self._heard.close()
        self._rung.close()


class ProcessLoop:
    """The process's event loop, in a daemon thread; made on first use, so after the fork."""

    def __init__(self, task_factory: Callable[..., Any]) -> None:
        self._task_factory = task_factory
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Start anew: a forked child has neither its parent's threads nor its locks' owners."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                # In an empty context: the loop would keep the first caller's for ever.
                self._loop = Context().run(_new_event_loop)
                self._loop.set_task_factory(self._task_factory)
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name="celeriac-loop", daemon=True
                )
                self._thread.start()
                _Watch(self._loop, self._thread).start()
            return self._loop

    def close(self) -> None:
        """Stop the loop and close it: at the end of a worker process, and in tests."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        closing = asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop)
        with suppress(Exception):
            closing.result(_CLOSING)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSING)
        if not thread.is_alive():
            loop.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run `loop` until it is stopped; a task that exits ends itself, not all the others."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:  # what asyncio lets through
            logger.error("something on the event loop raised %r; the loop goes on", error)
        else:
            return


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _Watch:
    """Say in the log what blocks the loop, and where it stands: all other tasks stand with it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self._loop, self._watched = loop, thread
        self._turn = time.monotonic()

    def start(self) -> None:
        # In an empty context, which every turn passes on to the next.
        self._loop.call_soon_threadsafe(self._take_turn, context=Context())
        threading.Thread(target=self._look, name="celeriac-watch", daemon=True).start()

    def _take_turn(self) -> None:
        self._turn = time.monotonic()
        self._loop.call_later(_LOOK_EVERY, self._take_turn)

    def _look(self) -> None:
        told = False
        while self._watched.is_alive():
            self._watched.join(_LOOK_EVERY)
            late = time.monotonic() - self._turn
            if late < _BLOCKED_AFTER + _LOOK_EVERY:
                told = False
            elif not told and self._watched.is_alive():
                told = True
                self._tell(late)

    def _tell(self, late: float) -> None:
        frame = sys._current_frames().get(self._watched.ident or 0)
        task = asyncio.current_task(self._loop)
        logger.warning(
            "%s has blocked the event loop for %.1f s: await, or hand it to asyncio.to_thread\n%s",
            task.get_name() if task is not None else "a callback",
            late,
            "".join(traceback.format_stack(frame)) if frame is not None else "",
        )
