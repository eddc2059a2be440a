"""Types of what Celery leaves untyped: tasks whose arguments a type checker knows.

At run time there is nothing here but Celery's own objects.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

import celery
from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

if TYPE_CHECKING:
    from celeriac.commit import AnySession
    from celeriac.handle import Handle

    class TypedTask(Generic[P, R_co]):
        """A task of `def body(*P) -> R` or of `async def`, where R is an awaitable."""

        name: str
        app: Celery
        request: Any

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult: ...
        async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Handle: ...
        def delay_on_commit(
            self, session: AnySession, /, *args: P.args, **kwargs: P.kwargs
        ) -> Handle: ...
        def apply_async_on_commit(
            self,
            session: AnySession,
            args: Iterable[Any] | None = None,
            kwargs: Mapping[str, Any] | None = None,
            *,
            ordering_key: str | None = None,
            **options: Any,
        ) -> Handle: ...
        def s(self, *args: Any, **kwargs: Any) -> Signature: ...
        def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature: ...
        def apply_async(
            self,
            args: Iterable[Any] | None = None,
            kwargs: Mapping[str, Any] | None = None,
            **options: Any,
        ) -> AsyncResult: ...
        async def aapply_async(
            self,
            args: Iterable[Any] | None = None,
            kwargs: Mapping[str, Any] | None = None,
            *,
            publish_timeout: float | None = None,
            **options: Any,
        ) -> Handle: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    class TaskMaker(Protocol):
        """A decorator that makes typed tasks."""

        @overload
        def __call__(self, body: Callable[P, R], /) -> TypedTask[P, R]: ...
        @overload
        def __call__(
            self, *, bind: Literal[True], **options: Any
        ) -> Callable[[Callable[Concatenate[Any, P], R]], TypedTask[P, R]]: ...
        @overload
        def __call__(
            self, *, bind: Literal[False] = False, **options: Any
        ) -> Callable[[Callable[P, R]], TypedTask[P, R]]: ...
        def __call__(self, *args: Any, **options: Any) -> Any: ...

    class App(Celery):  # type: ignore[misc]
        """A Celery app whose tasks are typed."""

        task: TaskMaker

    shared_task: TaskMaker

else:
    App = Celery
    TaskMaker = Callable
    TypedTask = celery.Task

    def shared_task(*args: Any, **options: Any) -> Any:
        """`celery.shared_task`, typed: a wrong argument of `delay` or `adelay` is an error."""
        return celery.shared_task(*args, **options)


def typed(app: Celery) -> App:
    """The same object, seen with its types."""
    return cast(App, app)
