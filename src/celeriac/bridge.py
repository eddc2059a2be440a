"""Run a coroutine from Celery's synchronous code, on one persistent event loop per process.

Celery's tracer calls a task's body and wants its value back. `run_body` starts the body on the
process's loop, which has a thread of its own and outlives the task, so that what a body opens
there (a connection pool, an HTTP client) serves the next one too.

The body does not run as a plain asyncio task but is stepped inside a greenlet of one: synchronous
code in the middle of it, such as an eager call of another async task, finds the greenlet and hands
its own coroutine up instead of waiting for a loop that waits for it. The pool goes one step
further and runs the tracer itself in such a greenlet.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from greenlet import getcurrent, greenlet

from celeriac.errors import BodyCancelledError, LoopWouldWaitError, UnsupportedPoolError
from celeriac.executor import DaemonThreads
from celeriac.loop import ProcessLoop

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 5.0  # seconds for what was cancelled to clean up
_BLOCKING_CALLS = 16  # at once, in threads

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

    hosted: "Hosted"


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

    __slots__ = (
        "_args", "_bodies", "_body_ended", "_passes_cancellation", "_task", "_thrown", "function",
        "stopped",
    )  # fmt: skip

    def __init__(
        self, function: Callable[..., Any], *args: Any, passes_cancellation: bool = False
    ) -> None:
        self.function, self._args = function, args
        # Whether a body that ends cancelled was cancelled by the one who awaits the call.
        self._passes_cancellation = passes_cancellation
        self._task: asyncio.Task[Any] | None = None
        self._thrown: BaseException | None = None
        self._bodies = 0
        self._body_ended = False
        self.stopped = False

    @property
    def in_body(self) -> bool:
        """Whether a task's body waits, not the tracer around it."""
        return self._bodies > 0

    async def run(self, context: Context | None = None) -> Any:
        """The call's value. `context` is its own; a copy of the current one if not given."""
        self._task = asyncio.current_task()
        stepper = _Stepper(self.function)
        stepper.hosted = self
        context = stepper.gr_context = context or copy_context()
        # What runs for it in threads finds its request by this; the greenlet itself would be part
        # of a cycle, and collecting those is a quarter of what a small task costs.
        if context.get(_tracer) is None:
            context.run(_tracer.set, self)
        try:
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
        finally:
            self._task = None

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

    def stop(self) -> bool:
        """Cancel the body, whose outcome is dropped, and say whether that was to be done.

        On the loop's thread. What the tracer does before and after the body is never cut short.
        """
        if self._body_ended or self.stopped:  # a second time would disturb its `finally` blocks
            return False
        self.stopped = True
        if self.in_body and self._task is not None:
            self._task.cancel()
        return True

    def body(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a task's body inside the call's greenlet, and end with it what it started."""
        if self.stopped:
            coroutine.close()
            raise asyncio.CancelledError
        children: Children = set()
        token = _children.set(children)
        self._bodies += 1
        try:
            value = _step(coroutine)
            if self._task is not None and self._task.cancelling():
                _step(asyncio.sleep(0))  # a cancellation of its own must not hit the tracer
            return value
        except asyncio.CancelledError as error:
            if self.stopped or self._passes_cancellation:
                raise
            raise BodyCancelledError from error
        finally:
            self._bodies -= 1
            self._body_ended = not self._bodies
            _children.reset(token)
            if children:
                _step(_cancel(children))
            if self.stopped:
                raise asyncio.CancelledError


async def _cancel(children: Children) -> None:
    """End what the body started and left, and say what went wrong in it."""
    left = {child for child in children if not child.done()}
    if not left:
        return
    for child in left:
        child.cancel()
    ended, stubborn = await asyncio.wait(left, timeout=PATIENCE)
    for child in ended:
        if not child.cancelled() and (error := child.exception()) is not None:
            logger.error("an asyncio task that a task had left behind failed", exc_info=error)
    for child in stubborn:
        logger.error(
            "%r was cancelled %g s ago and does not end: it is left behind", child, PATIENCE
        )


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


_process = ProcessLoop(_task_factory)
_threads = DaemonThreads(_BLOCKING_CALLS, "celeriac-blocking")
_waiting_threads = DaemonThreads(_BLOCKING_CALLS, "celeriac-waiting")


def loop() -> asyncio.AbstractEventLoop:
    """This process's event loop, which runs in a thread of its own."""
    return _process.get()


def close() -> None:
    """Stop this process's loop; the next use makes a new one."""
    _process.close()


async def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The value of the synchronous `function`; coroutines that it gives to `run` are awaited here.

    So Celery's own synchronous code can wait for the running loop without blocking it.
    """
    hosted = Hosted(partial(function, *args, **kwargs), passes_cancellation=True)
    value: T = await hosted.run()
    return value


def hosted() -> bool:
    """Whether this is synchronous code inside an asyncio task, which `run` does not block."""
    return isinstance(getcurrent(), _Stepper)


def offload(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The value of the blocking `function`, called in a thread where it would block a loop.

    It must not wait for one of the producers that callers share: those who hold them all need a
    thread here to send and to give them back. `offload_wait` is for what may.
    """
    return _offload(_threads, partial(function, *args, **kwargs))


def offload_wait(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`offload` for what may wait for a producer, as whatever sends a message by itself does."""
    return _offload(_waiting_threads, partial(function, *args, **kwargs))


def _offload(threads: DaemonThreads, function: Callable[[], T]) -> T:
    if not hosted():
        return function()
    return run(in_thread(threads, partial(copy_context().run, function)))


async def in_thread(
    threads: DaemonThreads, function: Callable[[], T], *, surely: bool = False
) -> T:
    """The value of `function`, called in one of `threads`.

    Cancelled before it is called it is not, unless `surely`; later it is awaited all the same.
    """
    begun: Future[T] = threads.submit(function)
    waits = asyncio.wrap_future(begun)
    try:
        return await (asyncio.shield(waits) if surely else waits)
    except (Exception, asyncio.CancelledError):
        if surely or not begun.cancel():
            await _end_of(begun)
        raise


async def _end_of(begun: Future[Any]) -> None:
    """A thread cannot be interrupted, and uses until then what its caller would give back."""
    while not begun.done():
        seen = asyncio.wrap_future(begun)
        seen.add_done_callback(_ignore)
        with suppress(Exception, asyncio.CancelledError):  # a first one waits to be raised
            await asyncio.wait((seen,))


def _ignore(ended: asyncio.Future[Any]) -> None:
    if not ended.cancelled():
        ended.exception()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of `coroutine`, run on the process's loop, in the caller's context.

    What is raised in the waiting thread, as Celery's soft time limit is, is raised inside the
    coroutine instead, where it waits; its `finally` blocks run before this returns. Inside a
    hosted call it runs on the loop that hosts it.

    Raises UnsupportedPoolError where gevent or eventlet have replaced threads, and
    LoopWouldWaitError on the loop itself but outside a hosted call.
    """
    if hosted():
        return _step(coroutine)  # its parent awaits for us
    return _from_thread(_step, coroutine)


def run_body(coroutine: Coroutine[Any, Any, T]) -> T:
    """`run` for the body of a task: what it starts and leaves is cancelled and awaited.

    Raises BodyCancelledError where the coroutine ended with asyncio.CancelledError.
    """
    if hosted():
        return _body_here(coroutine)
    return _from_thread(_body_here, coroutine)


def _body_here(coroutine: Coroutine[Any, Any, T]) -> T:
    stepper = getcurrent()
    assert isinstance(stepper, _Stepper)
    return stepper.hosted.body(coroutine)


class _Waiting:
    """One hosted call on the process's loop, seen from the thread that waits for it."""

    def __init__(self, function: Callable[..., Any], coroutine: Coroutine[Any, Any, Any]) -> None:
        self._context = context_of_tracer()
        self._context.run(_runs_direct_calls.set, False)
        self._hosted = Hosted(function, coroutine)
        self.throw, self.stop = self._hosted.throw, self._hosted.stop
        self.outcome: Future[Any] = Future()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, on the loop's thread."""
        try:
            self._task = loop.create_task(self._run(), name="celeriac-body", context=self._context)
        except BaseException as error:  # without memory for it; the thread must not wait for ever
            self.outcome.set_exception(error)

    async def _run(self) -> None:
        """Never raises: a SystemExit, as Celery's WorkerShutdown is, would end the loop with it."""
        try:
            value = await self._hosted.run()
        except BaseException as error:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(value)


_awaited: set[_Waiting] = set()  # by threads
os.register_at_fork(after_in_child=_awaited.clear)


def _from_thread(function: Callable[..., T], coroutine: Coroutine[Any, Any, T]) -> T:
    _refuse_green_threads(coroutine)
    try:
        loop = _process.get()
    except BaseException:
        coroutine.close()
        raise
    waiting = _Waiting(function, coroutine)
    if asyncio._get_running_loop() is loop:  # it would wait for itself, and all tasks with it
        coroutine.close()
        raise LoopWouldWaitError
    _awaited.add(waiting)
    try:
        loop.call_soon_threadsafe(waiting.start, loop)
        while True:
            try:
                result: T = waiting.outcome.result()
                return result
            except BaseException as error:
                if waiting.outcome.done():
                    raise
                loop.call_soon_threadsafe(waiting.throw, error)
    finally:
        _awaited.discard(waiting)


def cancel_awaited() -> None:
    """Cancel the bodies that threads of this process wait for; their outcomes are dropped."""
    loop = _process.get()
    for waiting in tuple(_awaited):
        loop.call_soon_threadsafe(waiting.stop)


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
