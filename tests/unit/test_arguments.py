"""Arguments and results of tasks with `pydantic=True`: checked at the call, real in the body."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import celery
import pytest
from celery import Celery
from fastapi import Depends
from kombu.exceptions import EncodeError
from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from celeriac import adopt, bridge
from celeriac.errors import ArgumentError
from celeriac.inject import injected
from celeriac.task import Task

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=timezone(timedelta(hours=1)))
ID = UUID(int=7)


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0
    at: datetime = NOW


class Further(Point):
    z: int = 0


@dataclass
class Line:
    start: Point
    end: Point
    colour: Colour = Colour.RED


class Pair(NamedTuple):
    a: int
    b: Decimal


VALUES: dict[str, tuple[Any, Any]] = {
    "list of models": (list[Point], [Point(x=1), Point(x=2)]),
    "models by key": (dict[str, Point], {"a": Point(x=1)}),
    "models by number": (dict[int, Point], {1: Point(x=1)}),
    "tuple": (tuple[Point, int], (Point(x=1), 2)),
    "set": (set[int], {1, 2}),
    "optional": (Point | None, Point(x=1)),
    "absent": (Point | None, None),
    "dataclass": (Line, Line(Point(x=1), Point(x=2))),
    "dataclasses": (list[Line], [Line(Point(x=1), Point(x=2))]),
    "named tuple": (Pair, Pair(1, Decimal("1.10"))),
    "datetime": (datetime, NOW),
    "dates": (list[date], [NOW.date()]),
    "interval": (timedelta, timedelta(seconds=90)),
    "uuid": (UUID, ID),
    "uuids": (dict[UUID, list[UUID]], {ID: [ID]}),
    "decimal": (Decimal, Decimal("1.10")),
    "enum": (Colour, Colour.RED),
    "enums": (list[Colour], [Colour.RED]),
    "bytes": (bytes, b"\xff\x00"),
    "bytes in a tuple": (tuple[bytes, ...], (b"text", b"\xff")),
    "anything": (dict[str, Any], {"at": NOW, "id": ID, "b": b"\xff"}),
    "untyped": (dict, {"at": NOW}),
    "constrained": (Annotated[int, Field(gt=0)], 1),
}


@pytest.fixture(autouse=True)
def _close_loop() -> Iterator[None]:
    yield
    bridge.close()


@pytest.fixture
def app() -> Celery:
    app = adopt(Celery("typed", broker="memory://", backend="cache+memory://"))
    app.conf.task_always_eager = True
    return app


class Foreign(celery.Task):  # type: ignore[misc]
    """Somebody's base class."""


@pytest.fixture(params=["sync", "async", "foreign", "bound"])
def make(request: pytest.FixtureRequest, app: Celery) -> Callable[..., Any]:
    """A task that takes one value of a type and gives it back."""

    def decorate(kind: Any, seen: list[Any] | None = None, **options: Any) -> Any:
        kept = seen if seen is not None else []

        def sync(value: kind) -> kind:
            kept.append(value)
            return value

        async def asynchronous(value: kind) -> kind:
            await asyncio.sleep(0)
            kept.append(value)
            return value

        def bound(self: Task, value: kind) -> kind:
            kept.append(value)
            return value

        options |= {"pydantic": True, "shared": False, "name": "echo"}
        task = {
            "sync": lambda: app.task(**options)(sync),
            "async": lambda: app.task(**options)(asynchronous),
            "foreign": lambda: app.task(base=Foreign, **options)(sync),
            "bound": lambda: app.task(bind=True, **options)(bound),
        }[request.param]()
        app.finalize()
        return task

    return decorate


async def adelay(task: Any, *args: Any, **kwargs: Any) -> Any:
    """What awaits the result, by whatever way there is."""
    from celeriac import adelay

    return await (await adelay(task, *args, **kwargs)).result()


@pytest.mark.parametrize("kind", VALUES)
def test_the_body_has_the_callers_value_and_the_caller_the_bodys(
    kind: str, make: Callable[..., Any]
) -> None:
    annotation, value = VALUES[kind]
    seen: list[Any] = []
    task = make(annotation, seen)
    for result in (asyncio.run(adelay(task, value)), asyncio.run(adelay(task, value=value))):
        assert result == value
        assert type(result) is type(value)
    assert seen == [value, value]
    assert {type(each) for each in seen} == {type(value)}


def test_a_celery_result_is_plain(make: Callable[..., Any]) -> None:
    line = Line(Point(x=1), Point(x=2))
    end = {"x": 2, "y": 0, "at": "2026-11-20T12:00:00+01:00"}
    assert make(Line).delay(line).get() == {"start": end | {"x": 1}, "end": end, "colour": "red"}


@pytest.mark.parametrize(
    ("annotation", "wrong", "where"),
    [
        (int, "x", "value"),
        (list[Point], [{"x": 1}, {"x": "y"}], "value.1.x"),
        (datetime, "yesterday", "value"),
        (Colour, "blue", "value"),
        (Annotated[int, Field(gt=0)], 0, "value"),
    ],
)
def test_a_wrong_argument_is_the_callers_error(
    annotation: Any, wrong: Any, where: str, make: Callable[..., Any]
) -> None:
    seen: list[Any] = []
    task = make(annotation, seen)
    calls: list[Callable[[], Any]] = [
        lambda: task.delay(wrong),
        lambda: task.apply_async((), {"value": wrong}),
        lambda: task.s(wrong).delay(),
        lambda: asyncio.run(adelay(task, wrong)),
        lambda: asyncio.run(adelay(task.s(), wrong)),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=rf"^task echo: {where}: Input should be"):
            call()
    assert seen == []


def test_all_wrong_arguments_are_named_and_missing_ones_are_celerys(app: Celery) -> None:
    @app.task(pydantic=True, shared=False)
    def body(a: int, b: list[int], *, c: str = "") -> None: ...

    with pytest.raises(ValueError, match=r"^task .*body: a: Input should [^;]*; b\.0: Input"):
        body.delay("x", b=["y"])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        body.delay(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
        body.delay(1, [], d=1)


def test_what_would_not_arrive_as_it_is_is_refused(make: Callable[..., Any]) -> None:
    class Secret(BaseModel):
        word: SecretStr

    for annotation, value in ((Secret, Secret(word=SecretStr("x"))), (Point, Further(x=1, z=2))):
        task = make(annotation)
        with pytest.raises(EncodeError):
            task.delay(value)
        task.app._tasks.pop("echo")


def test_names_decide_and_other_parameters_stay_as_they_are(app: Celery) -> None:
    class Somebodys: ...

    def body(
        a: Any,
        b: Somebodys | None,
        *rest: Point,
        c: "list[Point]",
        d: "Unknown" = 1,  # type: ignore[name-defined]  # noqa: F821
        f: list["Unknown"] | None = None,  # type: ignore[name-defined]  # noqa: F821
        **more: Point,
    ) -> Any:
        return [a, b, list(rest), [each.x for each in c], d, f, more]

    task = app.task(pydantic=True, shared=False)(body)
    assert task.delay({"x": 1}, None, 2, c=[{"x": 3}], e=4, f=[5]).get() == [
        {"x": 1}, None, [2], [3], 1, [5], {"e": 4},
    ]  # fmt: skip


def test_celerys_own_options_count(app: Celery) -> None:
    contexts: list[Any] = []

    class Named(BaseModel):
        number: int = Field(alias="n")
        at: datetime

        @field_validator("number")
        @classmethod
        def note(cls, value: int, info: ValidationInfo) -> int:
            contexts.append(info.context)
            return value

    @app.task(
        pydantic=True, pydantic_strict=True, pydantic_context={"mine": 1},
        pydantic_dump_kwargs={"by_alias": True}, shared=False, name="options",
    )  # fmt: skip
    def body(named: Named, other: list[Named] | None = None) -> list[Named]:
        return [named]

    named = Named(n=1, at=NOW)
    assert body.delay(named, [named]).get() == [{"n": 1, "at": "2026-11-20T12:00:00+01:00"}]
    assert contexts[-1] == {"mine": 1, "celery_app": app, "celery_task_name": "options"}
    with pytest.raises(ArgumentError, match=r"named\.n"):
        body.delay({"n": "1", "at": NOW})
    assert asyncio.run(adelay(body, named)) == [named]


def test_a_direct_call_is_celerys(app: Celery) -> None:
    @app.task(pydantic=True, shared=False)
    def model(point: Point) -> Point:
        return point

    @app.task(pydantic=True, shared=False)
    def models(points: list[Point]) -> list[Point]:
        return points

    @app.task(pydantic=True, shared=False)
    async def asynchronous(point: Point) -> Point:
        return point

    assert model({"x": 1}) == Point(x=1).model_dump(mode="json")
    assert models([{"x": 1}]) == [Point(x=1)]
    assert asyncio.run(asynchronous({"x": 1})) == Point(x=1)


def test_dependencies_are_no_arguments(make: Callable[..., Any], app: Celery) -> None:
    class Session: ...

    session = Session()

    @app.task(pydantic=True, shared=False)
    def body(
        session: Annotated[Session, Depends(lambda: session)],
        points: list[Point],
        again: Annotated[Point, Depends(lambda: {"no": "point"})] = injected,
    ) -> tuple[bool, int, object]:
        return isinstance(session, Session), points[0].x, again

    assert asyncio.run(adelay(body, [Point(x=1)])) == (True, 1, {"no": "point"})
    assert asyncio.run(adelay(body, [Point(x=1)], again="given")) == (True, 1, "given")


def test_what_json_carries_by_itself_travels_as_in_celery() -> None:
    app = adopt(Celery("message", broker="memory://", set_as_current=False))
    app.conf.update(
        broker_pool_limit=0, task_default_queue="arguments-message"
    )  # memory:// is one for all

    @app.task(pydantic=True, shared=False)
    def body(at: datetime, ids: list[UUID], point: Point) -> None: ...

    body.delay(NOW, [ID], point=Point(x=1))
    body.apply_async(("2026-11-20T12:00:00+01:00", [str(ID)], {"x": "1"}))
    with app.connection() as connection:
        for _ in range(2):
            message = connection.default_channel.basic_get("arguments-message")
            (at, ids, *more), kwargs, _ = message.payload
            assert (at, ids) == (NOW, [ID])
            assert [*more, *kwargs.values()] == [Point(x=1).model_dump(mode="json")]
            connection.default_channel.basic_ack(message.delivery_tag)


def test_a_result_may_say_more_than_its_annotation_or_nothing(app: Celery) -> None:
    @app.task(pydantic=True, shared=False)
    def more() -> Point:
        return Further(x=1, z=2)

    @app.task(pydantic=True, shared=False)
    def nothing() -> list[Point] | Point:
        return None  # type: ignore[return-value]

    assert more.delay().get()["z"] == 2
    assert asyncio.run(adelay(nothing)) is None


def test_a_retry_sends_what_came(app: Celery) -> None:
    seen: list[Any] = []

    @app.task(bind=True, pydantic=True, shared=False)
    def body(self: Task, points: list[Point]) -> int:
        seen.append(points)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        if self.request.retries == 1:
            raise self.retry(args=([Point(x=2)],), countdown=0)
        return points[0].x

    assert body.delay([Point(x=1)]).get() == 2
    assert seen == [[Point(x=1)], [Point(x=1)], [Point(x=2)]]


def test_a_result_that_is_none_of_its_type_is_the_readers_error(app: Celery) -> None:
    @app.task(pydantic=True, shared=False)
    def wrong() -> list[Point]:
        return "no points"  # type: ignore[return-value]

    assert wrong.delay().get() == "no points"
    with pytest.raises(ValidationError, match="list"):
        asyncio.run(adelay(wrong))


def test_tasks_without_the_option_stay_as_they_are(app: Celery) -> None:
    @app.task(shared=False)
    def body(a: int) -> int:
        return a

    assert body.delay("x").get() == "x"
    assert asyncio.run(adelay(body, "x")) == "x"
    assert body.celeriac_arguments is None
