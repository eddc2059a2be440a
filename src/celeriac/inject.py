"""FastAPI's dependencies in tasks: `session: SessionDep = injected`, resolved by the worker.

Each run has its own. They end with the body, before its outcome is stored.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import celery
from celery import Celery

from celeriac import bridge
from celeriac.dependencies import Dependency, dependency, injected, needs_of
from celeriac.executor import DaemonThreads
from celeriac.signatures import set_header, signature_of

__all__ = ["inject", "injected", "overrides"]

Call = Callable[..., Any]
T = TypeVar("T")

# For synchronous dependencies of `async def` bodies: as many at once as FastAPI has. Leaving has
# threads of its own: who waits for a connection in all the others waits for somebody to leave.
_entering = DaemonThreads(40, "celeriac-entering")
_leaving = DaemonThreads(40, "celeriac-leaving")

_overrides: WeakKeyDictionary[Celery, dict[Call, Call]] = WeakKeyDictionary()


def overrides(app: Celery) -> dict[Call, Call]:
    """What the tasks of `app` get in the place of a dependency; for tests.

    `overrides(app)[get_session] = fake_session`, as in FastAPI's `dependency_overrides`, which may
    be the same dictionary.
    """
    return _overrides.setdefault(app, {})


def inject(task: celery.Task, body: Call) -> Call:
    """`body`, run with the dependencies of `task`; the same if it has none.

    Raises ConfigurationError for a dependency that needs a request.
    """
    function = inspect.unwrap(getattr(body, "__func__", body))
    needs = needs_of(f"task {task.name}", function)
    if not needs:
        return body
    filled_in = _Filled(task, body, needs)
    if inspect.iscoroutinefunction(function):

        @wraps(body)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            async with AsyncExitStack() as stack:
                args, kwargs = await filled_in(_Loop(stack), args, kwargs)
                return await body(*args, **kwargs)

        return run_async

    async def run(*args: Any, **kwargs: Any) -> Any:
        async with AsyncExitStack() as stack:
            args, kwargs = await filled_in(_Thread(stack), args, kwargs)
            return body(*args, **kwargs)

    @wraps(body)
    def run_sync(*args: Any, **kwargs: Any) -> Any:
        return _finished(run(*args, **kwargs))

    return run_sync


def _finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("a synchronous body has waited")


class _Filled:
    """The arguments of a body, with its dependencies among them."""

    def __init__(self, task: celery.Task, body: Call, needs: dict[str, Dependency]) -> None:
        self._task, self._needs = task, needs
        # Not that of a function inside a decorator: positions are those of what is called.
        signature = signature_of(body, follow_wrapped=False)
        # Without a default it is given by its name, if at all, and takes no caller's place.
        parameters = [
            each.replace(kind=each.KEYWORD_ONLY, default=injected)
            if each.name in needs and each.default is each.empty
            else each
            for each in signature.parameters.values()
        ]
        self._moved = parameters != list(signature.parameters.values())
        parameters.sort(key=lambda each: each.kind)
        if self._moved:
            set_header(task, signature.replace(parameters=parameters))
        self._positions = [each.name for each in parameters if each.kind < each.VAR_POSITIONAL]

    async def __call__(
        self, place: "_Place", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {*self._positions[: len(args)], *kwargs}
        if self._moved:
            kwargs.update(zip(self._positions, args, strict=False))
            args = args[len(self._positions) :]
        values = _Values(place, _overrides.get(self._task.app) or {}, f"task {self._task.name}")
        for name, needed in self._needs.items():
            if name not in given or kwargs.get(name) is injected:
                kwargs[name] = await values.of(needed)
        return args, kwargs


class _Place:
    """Where a body runs, and how its dependencies are entered and left from there."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack

    async def call(self, function: Call, *args: Any) -> Any:
        """The value of a synchronous function."""
        raise NotImplementedError

    async def wait(self, function: Call, *args: Any) -> Any:
        """That of an asynchronous one."""
        raise NotImplementedError

    async def leave(self, manager: Any, *error: Any) -> None:
        """Leave a synchronous context. What it catches has happened all the same."""
        await self.call(manager.__exit__, *error)

    async def leave_async(self, manager: Any, *error: Any) -> None:
        if manager.gen.ag_frame is not None:  # or it has ended, as one that failed at its start
            await self.wait(manager.__aexit__, *error)


class _Loop(_Place):
    """For `async def` bodies: what may block is called in threads, in one context."""

    def __init__(self, stack: AsyncExitStack) -> None:
        super().__init__(stack)
        self._run = copy_context().run

    async def call(self, function: Call, *args: Any) -> Any:
        return await bridge.in_thread(_entering, partial(self._run, function, *args))

    async def leave(self, manager: Any, *error: Any) -> None:
        leave = partial(self._run, manager.__exit__, *error)
        await bridge.in_thread(_leaving, leave, surely=True)

    async def wait(self, function: Call, *args: Any) -> Any:
        return await function(*args)


class _Thread(_Place):
    """For synchronous bodies: what is asynchronous is awaited by one asyncio task on the loop.

    Of several, each would have a context of its own, and cancel scopes refuse that.
    """

    def __init__(self, stack: AsyncExitStack) -> None:
        super().__init__(stack)
        self._awaiting: asyncio.Task[None] | None = None
        stack.callback(self._close)

    async def call(self, function: Call, *args: Any) -> Any:
        return function(*args)

    async def wait(self, function: Call, *args: Any) -> Any:
        return bridge.run(self._ask(function, *args))

    async def _ask(self, function: Call, *args: Any) -> Any:
        if self._awaiting is None:
            self._asked: asyncio.Queue[Any] = asyncio.Queue()
            self._awaiting = asyncio.create_task(self._await(), name="celeriac-dependencies")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait((answer, partial(function, *args)))
        try:
            return await asyncio.shield(answer)
        except BaseException:
            if not answer.done():  # a time limit, say, was thrown in here
                self._awaiting.cancel()
                await asyncio.wait((answer,))
                answer.exception()  # has been seen
            raise

    async def _await(self) -> None:
        while (asked := await self._asked.get()) is not None:
            answer, function = asked
            try:
                answer.set_result(await function())
            except BaseException as error:
                answer.set_exception(error)
            del asked, answer, function

    def _close(self) -> None:
        if (awaiting := self._awaiting) is not None:

            async def end() -> None:
                self._asked.put_nowait(None)
                await awaiting

            bridge.run(end())


class _Values:
    """The dependencies of one run, each with one value."""

    def __init__(self, place: _Place, overrides: Mapping[Call, Call], where: str) -> None:
        self._place, self._overrides, self._where = place, overrides, where
        self._made: dict[Call, Any] = {}

    async def of(self, needed: Dependency) -> Any:
        call = needed.call
        if needed.use_cache and call in self._made:
            return self._made[call]
        made = await self._make(
            dependency(self._where, self._overrides[call]) if call in self._overrides else needed
        )
        return self._made.setdefault(call, made) if needed.use_cache else made

    async def _make(self, needed: Dependency) -> Any:
        values = {name: await self.of(each) for name, each in needed.needs.items()}
        for name, field in needed.fields.items():
            values[name] = field.get_default(call_default_factory=True)
        place, call = self._place, partial(needed.call, **values)
        match needed.kind:
            case "function":
                return await place.call(call)
            case "async function":
                return await place.wait(call)
            # To be left whatever becomes of entering: who is cancelled meanwhile may have entered.
            case "generator":
                manager = contextmanager(call)()
                place.stack.push_async_exit(partial(place.leave, manager))
                return await place.call(manager.__enter__)
            case _:
                scope = asynccontextmanager(call)()
                place.stack.push_async_exit(partial(place.leave_async, scope))
                return await place.wait(scope.__aenter__)
