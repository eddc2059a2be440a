"""Run a coroutine from Celery's synchronous code, on one persistent event loop per process.

Celery's tracer calls a task's body and wants its value back. `run` starts the body on the process's
loop, which has a thread of its own and outlives the task, so that what a body opens there (a
connection pool, an HTTP client) serves the next one too.

The body does not run as a plain asyncio task but is stepped inside a greenlet of one: synchronous
code in the middle of it, such as an eager call of another async task, finds the greenlet and hands
its own coroutine up instead of waiting for a loop that waits for it.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from celeriac.errors import BodyCancelledError, UnsupportedPoolError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Whose request and current task Celery's stacks mean: those of the tracer, wherever the body runs.
_tracer: ContextVar[object | None] = ContextVar("celeriac_tracer", default=None)
Children = set[asyncio.Task[Any]]
# asyncio tasks that the body started.
_children: ContextVar[Children | None] = ContextVar("celeriac_children", default=None)


# Whether a direct call of an async task runs it: see `running_direct_calls`.
_runs_direct_calls: ContextVar[bool] = ContextVar("celeriac_runs_direct_calls", default=False)


@contextmanager
def running_direct_calls() -> Iterator[None]:
    """Run async tasks that are called directly inside the block, instead of giving an awaitable.

    Celery calls errbacks so, and drops what they return.
    """
    token = _runs_direct_calls.set(True)
    try:
        yield
    finally:
        _runs_direct_calls.reset(token)


def runs_direct_calls() -> bool:
    return _runs_direct_calls.get()


def stack_key() -> object:
    """The key of Celery's task and request stacks; its own is the running greenlet alone."""
    return _tracer.get() or getcurrent()


def context_of_tracer() -> Context:
    """A copy of the current context in which Celery's stacks stay those of here, elsewhere too."""
    context = copy_context()
    context.run(_tracer.set, stack_key())
    return context


class _Stepper(greenlet):  # type: ignore[misc]
    """A greenlet inside an asyncio task; what is switched out of it is awaited by that task."""


class _Await:
    """Yield `future` to the running asyncio task as the coroutine inside the greenlet did."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self._future)


def _step(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` inside the current greenlet; the parent awaits what it waits for."""
    parent = getcurrent().parent
    assert parent is not None
    error: BaseException | None = None
    value: Any = None
    while True:
        try:
            future = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        error = value = None
        try:
            value = parent.switch(future)
        except BaseException as thrown:  # into the coroutine, at the place where it waits
            error = thrown


class Hosted:
    """A synchronous call inside an asyncio task: what it waits for with `run`, that task awaits."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function, self._args = function, args
        self._task: asyncio.Task[Any] | None = None
        self._thrown: BaseException | None = None

    async def run(self, context: Context | None = None) -> Any:
        """The call's value. `context` is its own; a copy of the current one if not given."""
        self._task = asyncio.current_task()
        stepper = _Stepper(self._function)
        stepper.gr_context = context or copy_context()
        waits_for = stepper.switch(*self._args)
        while not stepper.dead:
            try:
                value = await _Await(waits_for)
            except asyncio.CancelledError as cancelled:
                waits_for = stepper.throw(self._reason(cancelled))
            except BaseException as error:
                waits_for = stepper.throw(error)
            else:
                waits_for = stepper.switch(value)
        return waits_for

    def _reason(self, cancelled: asyncio.CancelledError) -> BaseException:
        if self._thrown is None:
            return cancelled
        assert self._task is not None
        self._task.uncancel()
        thrown, self._thrown = self._thrown, None
        return thrown

    def throw(self, error: BaseException) -> None:
        """Raise `error` where the call waits; on the loop's thread."""
        if self._task is not None and not self._task.done():
            self._thrown = error
            self._task.cancel()


async def call(function: Callable[..., T], *args: Any) -> T:
    """The value of the synchronous `function`; coroutines that it gives to `run` are awaited here.

    So Celery's own synchronous code can wait for the running loop without blocking it.
    """
    value: T = await Hosted(function, *args).run()
    return value


class _Body:
    """One coroutine on its way through the loop, seen from the thread that waits for it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._context = copy_context()
        self._context.run(_tracer.set, stack_key())
        self._context.run(_runs_direct_calls.set, False)
        self._hosted = Hosted(_step, coroutine)
        self.throw = self._hosted.throw
        self.outcome: Future[Any] = Future()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, on the loop's thread."""
        loop.create_task(self._run(), name="celeriac-body", context=self._context)

    async def _run(self) -> None:
        """Never raises: a SystemExit, as Celery's WorkerShutdown is, would end the loop with it."""
        children: Children = set()
        # The greenlet has a context of its own; what the body starts inherits this one.
        inside = copy_context()
        inside.run(_children.set, children)
        try:
            value = await self._hosted.run(inside)
        except BaseException as error:
            await _cancel(children)
            self.outcome.set_exception(error)
        else:
            await _cancel(children)
            self.outcome.set_result(value)


async def _cancel(children: Children) -> None:
    """End what the body started and left, and say what went wrong in it."""
    left = {child for child in children if not child.done()}
    for child in left:
        child.cancel()
    for result in await asyncio.gather(*left, return_exceptions=True):
        if isinstance(result, Exception):
            logger.error("an asyncio task that a task had left behind failed", exc_info=result)


def _task_factory(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], **options: Any
) -> "asyncio.Task[T]":
    task: asyncio.Task[T] = asyncio.Task(coroutine, loop=loop, **options)
    context: Context | None = options.get("context")
    children = _children.get() if context is None else context.get(_children)
    if children is not None:
        children.add(task)
        task.add_done_callback(children.discard)
    return task


class _Loop:
    """The process's event loop, in a daemon thread; made on first use, so after the fork."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Start anew: a forked child has neither its parent's thread nor its locks' owners."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                # In an empty context: the loop would keep the first caller's for ever.
                self._loop = Context().run(asyncio.new_event_loop)
                self._loop.set_task_factory(_task_factory)  # type: ignore[arg-type]
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="celeriac-loop", daemon=True
                )
                self._thread.start()
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
            closing.result(timeout=2.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=2.0)
        if not thread.is_alive():
            loop.close()


_process = _Loop()


def close() -> None:
    """Stop this process's loop; the next `run` makes a new one."""
    _process.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of `coroutine`, run on the process's loop, in the caller's context.

    What is raised in the waiting thread, as Celery's soft time limit is, is raised inside the
    coroutine instead, where it waits; its `finally` blocks run before this returns.

    Raises BodyCancelledError where the coroutine ended with asyncio.CancelledError, and
    UnsupportedPoolError where gevent or eventlet have replaced threads.
    """
    if isinstance(getcurrent(), _Stepper):
        return _step(coroutine)  # synchronous code inside a body: its parent awaits for us
    _refuse_green_threads(coroutine)
    loop, body = _process.get(), _Body(coroutine)
    loop.call_soon_threadsafe(body.start, loop)
    while True:
        try:
            result: T = body.outcome.result()
            return result
        except BaseException as error:
            if body.outcome.done():
                if isinstance(error, asyncio.CancelledError):
                    raise BodyCancelledError from error
                raise
            loop.call_soon_threadsafe(body.throw, error)


def _refuse_green_threads(coroutine: Coroutine[Any, Any, Any]) -> None:
    for library in ("gevent", "eventlet"):
        if library in sys.modules and _patched(library):
            coroutine.close()
            raise UnsupportedPoolError(library)


def _patched(library: str) -> bool:
    module = sys.modules.get(f"{library}.monkey" if library == "gevent" else "eventlet.patcher")
    if module is None:
        return False
    patched: Callable[[str], bool] | None = getattr(
        module, "is_module_patched" if library == "gevent" else "is_monkey_patched", None
    )
    return bool(patched and patched("threading" if library == "gevent" else "thread"))
