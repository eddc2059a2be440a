"""The task base class: `async def` bodies, in every pool of Celery's."""

import inspect
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import celery
from celery import Celery, _state
from celery.exceptions import Ignore
from celery.utils import uuid
from pydantic import BaseModel

from celeriac import bridge, emitter, publish, rabbitmq, records, runs
from celeriac.arguments import Arguments, arguments_of
from celeriac.dependencies import needs_of
from celeriac.handle import Handle
from celeriac.inject import inject

TaskContext = Callable[[celery.Task], AbstractContextManager[Any]]


def is_async(task: celery.Task) -> bool:
    """Whether the body of `task` is an `async def`, under whatever decorators."""
    body = getattr(task, "_orig_run", task.run)
    return inspect.iscoroutinefunction(inspect.unwrap(body))


def adopt_body(task: celery.Task) -> None:
    """Have Celery's tracer run an `async def` body, and any body with its dependencies.

    A direct call of the first, `task(1, 2)`, still gives the awaitable. Others stay as they are,
    but for the look at whether they may start, for which a base class of ours has Celery's hook.
    Raises ConfigurationError for dependencies that no task can have.
    """
    if "celeriac_adopted" in vars(task):
        return
    # Celery's autoretry stands around the body: it has to see the outcome, not the coroutine, and
    # the end of a session too.
    attribute = "_orig_run" if hasattr(task, "_orig_run") else "run"
    found = getattr(task, attribute)
    arguments = task.celeriac_arguments = arguments_of(task, found)
    body = inject(task, found if arguments is None else arguments.body)
    if arguments is not None:
        arguments.left_out = needs_of(f"task {task.name}", found)
        if not isinstance(task, Task):
            task._dump_pydantic_arguments = arguments.dump
    if is_async(task):
        body = _AsyncBody(task, body)
        if task._backend is None and not isinstance(task, Task):
            task.backend = _Backend(task.app)
    elif arguments is not None:
        body = _TypedBody(task, body)
    if (context := getattr(task.app, "celeriac_task_context", None)) is not None:
        body = _InContext(task, body, context)
    task.celeriac_adopted = True
    if body is not found:
        setattr(task, attribute, body)
        if task.request_stack is not None:  # of one that is bound
            task.request_stack.__ident_func__ = bridge.stack_key
    if not isinstance(task, Task):
        task.run = _Guarded(task, task.run)


_REFUSED = {runs.CANCELLED: "cancelled", runs.DOUBLED: "sent twice"}


def _refuse(task: celery.Task) -> None:
    """End a run that must not start."""
    request = task.request
    refused = request.__dict__.get("celeriac_refused")
    if refused is None:
        return
    request.celeriac_run = None
    if refused == runs.CANCELLED:
        task.backend.mark_as_revoked(request.id, "cancelled", request=request)
    raise Ignore(_REFUSED[refused])


class _Guarded:
    """What runs only where the run is not refused."""

    def __init__(self, task: celery.Task, function: Callable[..., Any]) -> None:
        self._task = task
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse(self._task)
        return self.__wrapped__(*args, **kwargs)


class _AsyncBody:
    def __init__(self, task: celery.Task, body: Callable[..., Any]) -> None:
        self._task, self._body = task, body
        self.__wrapped__ = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments: Arguments | None = self._task.celeriac_arguments
        if arguments is not None:
            args, kwargs = arguments.load(args, kwargs)
        coroutine = self._body(*args, **kwargs)
        request = self._task.request
        # The tracer calls once for each request; what the body calls itself, it awaits.
        direct = request.called_directly or request.__dict__.get("celeriac_running")
        if direct and not bridge.runs_direct_calls():
            return coroutine
        request.celeriac_running = True
        result = bridge.run_body(coroutine)
        return result if arguments is None else arguments.dump_result(result)


class _InContext:
    """A body inside what its application wants around it, as Flask's application context."""

    def __init__(self, task: celery.Task, body: Callable[..., Any], context: TaskContext) -> None:
        self._task, self._context = task, context
        self.__wrapped__ = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context(self._task):
            result = self.__wrapped__(*args, **kwargs)
        return self._awaited(result) if inspect.iscoroutine(result) else result

    async def _awaited(self, called: Coroutine[Any, Any, Any]) -> Any:
        """Of an `async def` that is called directly."""
        with self._context(self._task):
            return await called


class _TypedBody:
    """A synchronous body in the place of the one that Celery wraps for `pydantic=True`."""

    def __init__(self, task: celery.Task, body: Callable[..., Any]) -> None:
        self._task, self._body = task, body
        self.__wrapped__ = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments: Arguments = self._task.celeriac_arguments
        args, kwargs = arguments.load(args, kwargs)
        result = self._body(*args, **kwargs)
        # Celery dumps a model even where it is called directly, and nothing else.
        if self._task.request.called_directly and not isinstance(result, BaseModel):
            return result
        return arguments.dump_result(result)


# What the tracer, and a body, have the result backend do, which may block.
_BLOCKING = {
    "delete_group",
    "forget",
    "get_many",
    "get_result",
    "get_state",
    "get_status",
    "get_task_meta",
    "process_cleanup",
    "restore_group",
    "save_group",
    "set_chord_size",
}
# The same, which may send messages too: callbacks, the rest of a chord, RPC's results.
_SENDING = {
    "apply_chord",
    "mark_as_done",
    "mark_as_failure",
    "mark_as_retry",
    "mark_as_revoked",
    "mark_as_started",
    "store_result",
}


class _Backend:
    """An app's result backend for code on an event loop: what blocks is done in a thread."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        backend = self._app.backend  # Celery has one for each thread
        offload = self._offload(name)
        if offload is None or name in getattr(backend, "awaited", ()) or not bridge.hosted():
            return getattr(backend, name)
        return partial(offload, self._call, name)

    def _offload(self, name: str) -> Callable[..., Any] | None:
        if name in _SENDING:
            return bridge.offload_wait
        return bridge.offload if name in _BLOCKING else None

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._app.backend, name)(*args, **kwargs)


class Task(celery.Task):  # type: ignore[misc]
    """Celery's task, whose body may be an `async def`. `adopt` makes it an app's default base."""

    abstract = True
    celeriac_arguments: Arguments | None = None

    def __init__(self) -> None:
        super().__init__()
        adopt_body(self)
        if type(self).before_start is not Task.before_start:  # which it need not call
            self.before_start = _Guarded(self, self.before_start)  # type: ignore[method-assign]

    @property
    def backend(self) -> Any:
        """The result backend."""
        if self._backend is None and bridge.hosted():
            return _Backend(self.app)
        return super().backend

    @backend.setter
    def backend(self, backend: Any) -> None:
        self._backend = backend

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        super().on_bound(app)
        cls.request_stack.__ident_func__ = bridge.stack_key

    def apply(self, *args: Any, **options: Any) -> Any:
        """Celery's, of a task that can be followed like one that a worker runs."""
        options["task_id"] = options.get("task_id") or uuid()
        records.note_eager(self, options["task_id"])
        return super().apply(*args, **options)

    @publish.only_publishes
    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Celery's, with typed arguments, and delays of less than a second on quorum queues too."""
        typed = self.celeriac_arguments
        if typed is not None and (options.get("serializer") or self.serializer) != "pickle":
            args, kwargs = typed.dump(args, kwargs, passed_on=bool(options.get("parent_id")))
        if options.get("countdown") or options.get("eta"):
            options |= rabbitmq.delay(self.app, options)
        return super().apply_async(args, kwargs, *more, **options)

    def delay_on_commit(self, session: Any, /, *args: Any, **kwargs: Any) -> Handle:
        """`delay`, once `session` of SQLAlchemy has committed: see `celeriac.commit`."""
        return self.apply_async_on_commit(session, args, kwargs)

    def apply_async_on_commit(self, session: Any, *args: Any, **options: Any) -> Handle:
        """`apply_async`, once `session` of SQLAlchemy has committed: see `celeriac.commit`."""
        from celeriac.commit import apply_async_on_commit  # SQLAlchemy is an extra

        return apply_async_on_commit(self, session, *args, **options)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Celery's hook, before which it is known whether the run may start."""
        _refuse(self)
        super().before_start(task_id, args, kwargs)  # an app's own base class may come after ours

    def replace(self, sig: Any) -> Any:
        """Celery's, after which the task goes on."""
        self.request.celeriac_replaced = True
        return super().replace(sig)

    def progress(
        self, current: float, total: float | None = None, message: str | None = None
    ) -> None:
        """Tell how far this run is: state PROGRESS with `{"current", "total", "message"}`.

        Takes microseconds, in synchronous and in asynchronous bodies. Of several in quick
        succession the last is sure to be seen.
        """
        value = {"current": current, "total": total, "message": message}
        if (mine := emitter.of(self)) is not None:
            mine.progress(value)
        elif self.request.id is not None:
            self.update_state(state=emitter.PROGRESS, meta=value)

    def emit(self, event: str, data: Any = None) -> emitter.Room:
        """Tell whoever follows this run something of its own: a line, a part of the result.

        `data` is anything that goes into JSON, up to 64 KiB, or ValueError is raised. In an
        asynchronous body `await self.emit(…)`, which waits where more is told than can be sent.
        Only the newest 1000 events of a task are kept. Needs a Redis as the result backend.
        """
        mine = emitter.of(self)
        if mine is not None:
            mine.emit(event, data)
        return emitter.Room(mine)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Exception | None = None,
        throw: bool = True,
        eta: Any = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Celery's, which notes when, and if it was the last (see `burial.keep_exhausted`)."""
        request, last = self.request, self.max_retries if max_retries is None else max_retries
        request.celeriac_exhausted = bool(last) and last <= (request.retries or 0)
        wait = self.default_retry_delay if countdown is None else countdown
        request.celeriac_retry_at = eta.timestamp() if eta else time.time() + (wait or 0)
        return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)

    async def adelay(self, /, *args: Any, **kwargs: Any) -> Handle:
        """`delay` without blocking the event loop. Raises PublishError within the deadline."""
        return await publish.aapply_async(self, args, kwargs)

    async def aapply_async(
        self,
        args: Iterable[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        *,
        publish_timeout: float | None = None,
        **options: Any,
    ) -> Handle:
        """`apply_async` without blocking the event loop; see `celeriac.publish.aapply_async`."""
        return await publish.aapply_async(
            self, args, kwargs, publish_timeout=publish_timeout, **options
        )


def follow_bodies() -> None:
    """Make `current_task` right in async bodies and in the asyncio tasks that they start."""
    _state._task_stack.__ident_func__ = bridge.stack_key
