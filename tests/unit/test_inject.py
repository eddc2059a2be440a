"""FastAPI's dependencies in tasks: resolved as there, ended before the outcome is stored."""

import asyncio
import inspect
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from functools import partial, wraps
from typing import Annotated, Any

import celery
import pytest
from celery import Celery
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from fastapi import BackgroundTasks, Depends, Header, Query, Request, Response, WebSocket
from fastapi.security import OAuth2PasswordBearer, SecurityScopes
from typing_extensions import TypeAliasType

from celeriac import ConfigurationError, adopt, bridge
from celeriac.inject import injected, overrides
from celeriac.task import Task

KINDS = ["sync", "async"]


@pytest.fixture(autouse=True)
def _close_loop() -> Iterator[None]:
    yield
    bridge.close()


@pytest.fixture
def app() -> Celery:
    app = adopt(Celery("inject", broker="memory://", backend="cache+memory://"))
    app.conf.task_always_eager = True
    app.conf.task_default_retry_delay = 0
    return app


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, app: Celery) -> Callable[..., Any]:
    """A task of a synchronous function, which becomes an `async def` too."""

    def decorate(function: Callable[..., Any], **options: Any) -> Any:
        if request.param == "sync":
            return app.task(shared=False, **options)(function)

        async def body(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return function(*args, **kwargs)

        vars(body)["__signature__"] = inspect.signature(function)
        body.__name__ = "body"
        return app.task(shared=False, **options)(body)

    return decorate


seen: list[object] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


def plain() -> str:
    return "plain"


async def coroutine() -> str:
    await asyncio.sleep(0)
    return "coroutine"


def generator() -> Iterator[str]:
    try:
        yield "generator"
    except BaseException as error:
        seen.append(f"generator: {type(error).__name__}")
        raise
    else:
        seen.append("generator: success")
    finally:
        seen.append("generator: closed")


async def async_generator() -> AsyncIterator[str]:
    try:
        await asyncio.sleep(0)
        yield "async generator"
    except BaseException as error:
        await asyncio.sleep(0)
        seen.append(f"async generator: {type(error).__name__}")
        raise
    else:
        seen.append("async generator: success")
    finally:
        await asyncio.sleep(0)
        seen.append("async generator: closed")


@wraps(generator)
def decorated() -> Iterator[str]:
    return generator()


class Made:
    def __init__(self, part: Annotated[str, Depends(plain)]) -> None:
        self.part = part


class Called:
    async def __call__(self) -> str:
        return "called"


PlainDep = Annotated[str, Depends(plain)]


def test_every_kind_of_dependency_and_what_they_need_themselves(make: Callable[..., Any]) -> None:
    def nested(
        a: Annotated[str, Depends(coroutine)], b: str = Depends(generator), limit: int = 10
    ) -> list[object]:
        return [a, b, limit]

    def body(
        number: int,
        a: PlainDep = injected,
        b: str = Depends(coroutine),
        c: Annotated[str, Depends(generator)] = injected,
        d: Annotated[str, Depends(async_generator)] = injected,
        e: Annotated[Made, Depends()] = injected,
        f: Annotated[str, Depends(Called())] = injected,
        g: Annotated[list[object], Depends(nested)] = injected,
        h: Annotated[str, Depends(partial(str, "partial"))] = injected,
        i: Annotated[str, Depends(partial(decorated))] = injected,
    ) -> list[object]:
        return [number, a, b, c, d, e.part, f, g, h, i]

    assert make(body).delay(1).get() == [
        1, "plain", "coroutine", "generator", "async generator", "plain", "called",
        ["coroutine", "generator", 10], "partial", "generator",
    ]  # fmt: skip
    assert seen == [
        "generator: success", "generator: closed",
        "async generator: success", "async generator: closed",
        "generator: success", "generator: closed",
    ]  # fmt: skip


def test_one_value_for_a_run_unless_the_cache_is_not_wanted(make: Callable[..., Any]) -> None:
    numbers = iter(range(100))

    def number() -> int:
        return next(numbers)

    def double(n: Annotated[int, Depends(number)]) -> int:
        return 2 * n

    def body(
        a: Annotated[int, Depends(number)] = injected,
        b: Annotated[int, Depends(double)] = injected,
        c: Annotated[int, Depends(number, use_cache=False)] = injected,
        d: Annotated[int, Depends(number)] = injected,
    ) -> list[int]:
        return [a, b, c, d]

    task = make(body)
    assert task.delay().get() == [0, 0, 1, 0]
    assert task.delay().get() == [2, 4, 3, 2]


def test_a_caller_may_give_it(make: Callable[..., Any]) -> None:
    def body(a: int, b: PlainDep = injected, *, c: PlainDep = injected) -> list[object]:
        return [a, b, c]

    task = make(body)
    assert task.delay(1, "b").get() == [1, "b", "plain"]
    assert task.delay(1, c="c").get() == [1, "plain", "c"]
    assert task.delay(a=1, b="b", c="c").get() == [1, "b", "c"]


def test_a_direct_call_has_them_too(app: Celery) -> None:
    @app.task(shared=False)
    def sync(a: PlainDep = injected, b: str = Depends(async_generator)) -> list[str]:
        return [a, b]

    @app.task(shared=False)
    async def asynchronous(a: PlainDep = injected, b: str = Depends(generator)) -> list[str]:
        return [a, b]

    assert sync() == ["plain", "async generator"]
    assert sync.run(b="b") == ["plain", "b"]
    assert asyncio.run(asynchronous()) == ["plain", "generator"]


def test_without_a_default_it_takes_no_callers_place(make: Callable[..., Any]) -> None:
    def body(a: PlainDep, number: int, b: PlainDep, other: int = 2, *, c: PlainDep) -> list[object]:
        return [a, number, b, other, c]

    task = make(body)
    assert task.delay(1).get() == ["plain", 1, "plain", 2, "plain"]
    assert task.delay(1, 3, c="c").get() == ["plain", 1, "plain", 3, "c"]
    assert task.delay(number=1, a="a").get() == ["a", 1, "plain", 2, "plain"]
    for wrong in (partial(task.delay), partial(task.delay, 1, 2, 3), partial(task.delay, 1, x=1)):
        with pytest.raises(TypeError, match=r"body\(\)"):
            wrong()


def test_celery_still_checks_the_other_arguments_at_the_call(make: Callable[..., Any]) -> None:
    def body(number: int, a: PlainDep = injected) -> None: ...

    task = make(body)
    with pytest.raises(TypeError, match="number"):
        task.delay()
    with pytest.raises(TypeError, match="'x'"):
        task.delay(1, x=1)


def test_it_does_not_travel_in_the_message() -> None:
    app = adopt(Celery("message", broker="memory://", set_as_current=False))
    app.conf.update(
        broker_pool_limit=0, task_default_queue="inject-message"
    )  # memory:// is one for all

    @app.task(shared=False)
    def body(number: int, a: PlainDep = injected) -> None: ...

    body.delay(1)
    with app.connection() as connection:
        message = connection.default_channel.basic_get("inject-message")
        assert message.payload[:2] == [[1], {}]
        connection.default_channel.basic_ack(message.delivery_tag)


@pytest.mark.parametrize("error", [ValueError, Retry, Ignore])
def test_what_the_body_raises_is_raised_in_the_generators_too(
    error: type[Exception], make: Callable[..., Any]
) -> None:
    def body(
        a: Annotated[str, Depends(generator)] = injected,
        b: Annotated[str, Depends(async_generator)] = injected,
    ) -> None:
        raise error("why")

    make(body).apply()
    name = error.__name__
    assert seen == [
        f"async generator: {name}", "async generator: closed",
        f"generator: {name}", "generator: closed",
    ]  # fmt: skip


def test_an_error_that_a_generator_keeps_to_itself_is_the_tasks_all_the_same(
    make: Callable[..., Any],
) -> None:
    def keeps() -> Iterator[None]:
        with suppress(ValueError):
            yield

    async def keeps_too() -> AsyncIterator[None]:
        with suppress(ValueError):
            yield

    def body(
        a: Annotated[str, Depends(generator)] = injected,
        b: Annotated[None, Depends(keeps)] = injected,
        c: Annotated[None, Depends(keeps_too)] = injected,
    ) -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        make(body).delay().get()
    assert seen == ["generator: ValueError", "generator: closed"]


def test_a_task_whose_dependency_cannot_end_has_failed(
    make: Callable[..., Any], app: Celery
) -> None:
    def commits() -> Iterator[None]:
        yield
        raise ConnectionError("no commit")

    def body(
        a: Annotated[str, Depends(async_generator)] = injected,
        b: Annotated[None, Depends(commits)] = injected,
    ) -> str:
        return "done"

    result = make(body).delay()
    assert isinstance(result.result, ConnectionError)
    assert result.state == app.backend.get_state(result.id) == "FAILURE"
    assert seen[0] == "async generator: ConnectionError"


def test_a_dependency_that_fails_ends_what_was_entered_before_it(make: Callable[..., Any]) -> None:
    async def fails() -> AsyncIterator[None]:
        raise KeyError("nothing")
        yield

    def fails_too() -> Iterator[None]:
        raise KeyError("nothing")
        yield

    for failing in (fails, fails_too):
        seen.clear()

        def body(
            a: Annotated[str, Depends(generator)] = injected,
            b: Annotated[str, Depends(async_generator)] = injected,
            c: None = Depends(failing),
        ) -> None: ...

        with pytest.raises(KeyError):
            make(body, name=failing.__name__).delay().get()
        assert seen[::2] == ["async generator: KeyError", "generator: KeyError"]


@pytest.mark.parametrize("base", [None, celery.Task])
def test_autoretry_sees_the_end_of_a_session_and_each_try_has_its_own(
    base: Any, make: Callable[..., Any], app: Celery
) -> None:
    tries: list[int] = []

    def commits() -> Iterator[int]:
        yield len(tries)
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError

    def body(a: Annotated[int, Depends(commits)] = injected) -> int:
        return a

    task = make(
        body, base=base, autoretry_for=(ConnectionError,), retry_jitter=False, default_retry_delay=0
    )
    app.finalize()
    assert task.delay().get() == 2


def test_bound_and_class_based_tasks_and_those_of_a_foreign_base(app: Celery) -> None:
    class Foreign(celery.Task):  # type: ignore[misc]
        """Somebody's, who knows nothing of ours."""

    class ClassBased(app.Task):  # type: ignore[misc]
        name = "class_based"

        async def run(self, number: int, a: PlainDep = injected) -> list[object]:
            return [self.name, number, a]

    @app.task(bind=True, shared=False)
    def bound(self: Task, number: int, a: PlainDep) -> list[object]:
        return [self.name, number, a]

    @app.task(bind=True, base=Foreign, shared=False)
    async def foreign(self: Task, a: str = Depends(generator)) -> list[object]:
        return [type(self).__mro__[1] is Foreign, a]

    @app.task(base=Foreign, shared=False, autoretry_for=(KeyError,))
    def foreign_sync(a: str = Depends(async_generator)) -> str:
        return a

    class_based = app.register_task(ClassBased())
    app.finalize()
    assert class_based.delay(1).get() == ["class_based", 1, "plain"]
    assert bound.delay(1).get() == [bound.name, 1, "plain"]
    assert foreign.delay().get() == [True, "generator"]
    assert foreign_sync.delay().get() == "async generator"


def test_a_decorated_body_has_them_by_their_names(app: Celery) -> None:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(self: Task, *args: Any, **kwargs: Any) -> Any:
            return [self.name, function(*args, **kwargs)]

        return run

    @app.task(bind=True, shared=False)
    @decorate
    def body(number: int, a: PlainDep = injected) -> list[object]:
        return [number, a]

    assert body.delay(1).get() == [body.name, [1, "plain"]]


def test_overrides_are_those_of_one_app(make: Callable[..., Any], app: Celery) -> None:
    async def other(part: PlainDep) -> str:
        return f"other {part}"

    def body(a: str = Depends(generator), b: PlainDep = injected) -> list[str]:
        return [a, b]

    task = make(body)
    overrides(app)[generator] = other
    assert task.delay().get() == ["other plain", "plain"]
    overrides(app)[plain] = lambda: "changed"
    assert task.delay().get() == ["other changed", "changed"]
    overrides(app).clear()
    assert task.delay().get() == ["generator", "plain"]
    assert overrides(Celery("another")) == {}


def with_request(request: Request) -> None: ...
def with_socket(socket: WebSocket) -> None: ...
def with_response(response: Response = Response()) -> None: ...  # noqa: B008
def with_tasks(tasks: BackgroundTasks) -> None: ...
def with_scopes(scopes: SecurityScopes) -> None: ...
def with_query(q: str) -> None: ...
def with_header(token: Annotated[str, Header()]) -> None: ...
def with_field(q: str = Query()) -> None: ...
def with_nested(part: Annotated[None, Depends(with_request)]) -> None: ...


@pytest.mark.parametrize(
    ("dependency", "parameter"),
    [
        (with_request, "request"),
        (with_socket, "socket"),
        (with_response, "response"),
        (with_tasks, "tasks"),
        (with_scopes, "scopes"),
        (with_query, "q"),
        (with_header, "token"),
        (with_field, "q"),
        (OAuth2PasswordBearer("token"), "request"),
    ],
)
@pytest.mark.parametrize("base", [None, celery.Task])
def test_a_dependency_that_needs_a_request_is_refused_at_the_definition(
    dependency: Callable[..., Any], parameter: str, base: Any, app: Celery
) -> None:
    def body(who: Annotated[None, Depends(dependency)] = injected) -> None: ...

    name = getattr(dependency, "__name__", "OAuth2PasswordBearer")
    with pytest.raises(
        ConfigurationError, match=rf"task hello, parameter 'who'.*{name}.*'{parameter}'.*request"
    ):
        app.task(shared=False, name="hello")(body).name  # noqa: B018 (made when it is used)


def test_a_nested_one_is_refused_too_and_what_the_request_may_lack_is_not(app: Celery) -> None:
    @app.task(shared=False)
    def refused(who: Annotated[None, Depends(with_nested)] = injected) -> None: ...

    with pytest.raises(ConfigurationError, match=r"refused, parameter 'who'.*with_request"):
        refused.delay()

    def optional(a: Annotated[int, Query()] = 1, b: int = Query(2), c: int = 3) -> list[int]:
        return [a, b, c]

    @app.task(shared=False)
    def fine(numbers: Annotated[list[int], Depends(optional)] = injected) -> list[int]:
        return numbers

    assert fine.delay().get() == [1, 2, 3]


def test_injected_says_nothing_by_itself_and_a_limit_is_not_kept(app: Celery) -> None:
    @app.task(shared=False)
    def alone(a: int = injected) -> None: ...

    @app.task(shared=False)
    def limited(a: Annotated[str, Depends(plain, max_concurrency=1)] = injected) -> None: ...

    with pytest.raises(ConfigurationError, match=r"alone, parameter 'a'.*Depends"):
        alone.delay()
    with pytest.raises(ConfigurationError, match=r"limited, parameter 'a'.*max_concurrency"):
        limited.delay()
    assert repr(injected) == "injected"


def test_a_task_without_dependencies_keeps_its_body(app: Celery) -> None:
    def body(a: int, b: "Unknown" = 2, *c: int, **d: str) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert app.task(shared=False)(body).run is body


current: ContextVar[str] = ContextVar("current", default="nobody")


def sets() -> Iterator[None]:
    token = current.set("sync")
    yield
    current.reset(token)


async def sets_too() -> AsyncIterator[None]:
    token = current.set("async")
    async with asyncio.timeout(5):
        yield
    current.reset(token)


def test_each_generator_is_entered_and_left_in_one_context(make: Callable[..., Any]) -> None:
    def body(a: None = Depends(sets), b: None = Depends(sets_too), c: None = Depends(sets)) -> int:
        return 1

    assert make(body).delay().get() == 1


def test_what_may_block_is_called_in_threads_for_an_async_body_and_here_for_a_synchronous_one(
    make: Callable[..., Any],
) -> None:
    def thread() -> Iterator[threading.Thread]:
        seen.append(threading.current_thread())
        yield threading.current_thread()
        seen.append(threading.current_thread())

    def body(a: Annotated[threading.Thread, Depends(thread)] = injected) -> bool:
        seen.append(threading.current_thread())
        return True

    assert make(body).delay().get()
    entered, ran, left = seen
    if ran is threading.current_thread():
        assert entered is left is ran
    else:
        assert ran not in (entered, left)


def test_a_cancelled_body_ends_its_dependencies(app: Celery) -> None:
    @app.task(shared=False)
    async def body(a: str = Depends(generator), b: str = Depends(async_generator)) -> None:
        begun.set()
        await asyncio.sleep(60)

    begun = asyncio.Event()

    async def main() -> None:
        running = asyncio.create_task(body())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert seen[:2] == ["async generator: CancelledError", "async generator: closed"]
    assert seen[-1] == "generator: closed"


def test_who_is_cancelled_while_a_thread_enters_leaves_it(app: Celery) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow() -> Iterator[None]:
        begun.set()
        go.wait(10)
        try:
            yield
        finally:
            seen.append("left")

    @app.task(shared=False)
    async def body(a: None = Depends(slow)) -> None: ...

    async def main() -> None:
        running = asyncio.create_task(body())
        await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert seen == ["left"]


def test_a_time_limit_reaches_an_async_dependency_of_a_synchronous_body(app: Celery) -> None:
    async def slow() -> AsyncIterator[None]:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            await asyncio.sleep(60)
            yield
        finally:
            await asyncio.sleep(0)
            seen.append("slow: ended")

    @app.task(shared=False)
    def body(a: str = Depends(async_generator), b: None = Depends(slow)) -> None: ...

    def limit(*_: object) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, limit)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            body.delay().get()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen[0] == "slow: ended"
    assert seen[-1] == "async generator: closed"


AS_TEXT = """
from __future__ import annotations
from functools import partial
from typing import TYPE_CHECKING, Annotated
from fastapi import Depends
if TYPE_CHECKING:
    from elsewhere import Unknown

PlainDep = Annotated[str, Depends(str)]
class Made:
    def __init__(self, part: PlainDep) -> None:
        self.part = part
class Called:
    def __call__(self, part: PlainDep, unknown: Unknown = None) -> str:
        return f"called{part}"
def function(part: PlainDep, made: Annotated[Made, Depends()], prefix: str = "") -> str:
    return f"{prefix}function{part}{made.part}"
def body(
    a: PlainDep,
    b: Annotated[Unknown, 1] = 1,
    c: Annotated[str, Depends(Called())] = "",
    d: Annotated[str, Depends(partial(function, prefix="a "))] = "",
) -> Unknown:
    return [a, b, c, d]
"""


def test_annotations_may_be_text(app: Celery) -> None:
    module: dict[str, Any] = {"__name__": "as_text"}
    exec(AS_TEXT, module)
    assert app.task(shared=False)(module["body"]).delay().get() == ["", 1, "called", "a function"]


def test_an_annotation_may_have_a_name_of_its_own(app: Celery) -> None:
    alias = TypeAliasType("alias", PlainDep)  # what `type alias = …` makes

    def body(a: alias = injected) -> str:
        return str(a)

    assert app.task(shared=False)(body).delay().get() == "plain"
