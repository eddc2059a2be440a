"""What an app has once in each event loop, such as a connection of that loop."""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from celery import Celery


class Closable(Protocol):
    def aclose(self) -> Awaitable[None]: ...


T = TypeVar("T", bound=Closable | None)


@dataclass(slots=True)
class _Loop(Generic[T]):
    kept: dict[Celery, T] = field(default_factory=dict)
    end: AsyncGenerator[None, None] | None = None


class Registry(Generic[T]):
    """One T, or None, for each app in each event loop, closed with the loop.

    Sockets and loops made before a fork belong to the parent: a child starts anew.
    """

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, _Loop[T]] = {}
        self._inherited: list[Any] = []  # not freed: that would report their sockets as left open
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._inherited.append(self._loops)
        self._loops = {}

    async def get(self, app: Celery, make: Callable[[], T]) -> T:
        """That of `app` in the running loop, made if there is none yet."""
        try:
            return self._loops[asyncio.get_running_loop()].kept[app]
        except KeyError:
            return await self._make(app, make)

    async def _make(self, app: Celery, make: Callable[[], T]) -> T:
        running = asyncio.get_running_loop()
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            del self._loops[loop]
        here = self._loops.setdefault(running, _Loop())
        made = here.kept[app] = make()
        if here.end is None:
            here.end = self._close_with(running)
            await anext(here.end)
        return made

    async def _close_with(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        """Started and never finished: `shutdown_asyncgens`, at the end of a loop, finishes it."""
        try:
            yield
        finally:
            here = self._loops.pop(loop, None)
            for each in here.kept.values() if here is not None else ():
                if each is not None:
                    await each.aclose()
