"""The process's event loop, and who watches it."""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

logger = logging.getLogger(__name__)

_BLOCKED_AFTER = 1.0  # seconds in which nothing else on the loop had its turn
_LOOK_EVERY = 0.25
_CLOSING = 3.0


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
                loop = Context().run(_new_event_loop)
                loop.set_task_factory(self._task_factory)
                thread = threading.Thread(
                    target=_run, args=(loop,), name="celeriac-loop", daemon=True
                )
                try:
                    thread.start()
                except BaseException:  # no memory for one: the next caller may have more luck
                    loop.close()
                    raise
                self._loop, self._thread = loop, thread
                _Watch(loop, thread).start()
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
