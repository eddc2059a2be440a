"""Celery's handle of a task, to be awaited: by what its worker tells, not by asking again."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from celery import Celery, states
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult, EagerResult, GroupResult

from celeriac.arguments import typed_result
from celeriac.state import Status
from celeriac.status import Event, reader_of


class Handle(AsyncResult):  # type: ignore[misc]
    """Celery's AsyncResult, whose `result` is awaited; `info` has Celery's."""

    async def result(self, timeout: float | None = None) -> Any:
        """The value of the task once it has ended, without blocking the event loop.

        Of a task that is made here with `pydantic=True`, what its annotation says. Raises what the
        task raised, as `get` does, TaskRevokedError if it was revoked, and TimeoutError after
        `timeout` seconds.
        """
        name: str | None = None
        end: Status | Event | None = None
        async with asyncio.timeout(timeout), reader_of(self.app).follow(self.id) as events:
            async for event in events:
                end = event
                if isinstance(event, Status) and event.record is not None:
                    name = event.record.task
        if isinstance(end, Status) and end.state == states.REVOKED:  # of which Celery may not know
            raise TaskRevokedError((end.error or "").removeprefix(f"{end.code}: "))
        value = await asyncio.to_thread(self.get, disable_sync_subtasks=False)
        return typed_result(self.app, name, value)

    def get(self, *args: Any, **options: Any) -> Any:
        """Celery's, which blocks."""
        super().get(*args, **options)
        return self.info


class EagerHandle(EagerResult):  # type: ignore[misc]
    """The same of a task that ran where it was called."""

    async def result(self, timeout: float | None = None) -> Any:
        """Its value; raises what the task raised."""
        return typed_result(self.app, self._name, self.get(disable_sync_subtasks=False))

    def get(self, *args: Any, **options: Any) -> Any:
        """Celery's."""
        plain = EagerResult(self.id, self._result, self._state, self._traceback)
        return plain.get(*args, **options)


_KINDS = {AsyncResult: Handle, EagerResult: EagerHandle}


def handle(result: Any, app: Celery | None = None) -> Handle:
    """What Celery gave for a task of `app`, to be awaited; that of a group stays as it is."""
    kind = next((_KINDS[each] for each in type(result).__mro__ if each in _KINDS), None)
    if kind is not None and not isinstance(result, kind):
        result.__class__ = kind  # it holds on to its task: a second one would end that too
        result.app = result.app or app  # which Celery's of an eager run does not know
    made: Handle = result
    return made


async def as_completed(
    handles: Iterable[AsyncResult], timeout: float | None = None
) -> AsyncIterator[Handle]:
    """The handles, in the order in which their tasks end.

    Those of a group count one by one. Raises TimeoutError after `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    waiting = {
        asyncio.create_task(_end_of(each), name="celeriac-as-completed")
        for given in handles
        for each in (given.results if isinstance(given, GroupResult) else [given])
    }
    try:
        while waiting:
            left = None if deadline is None else deadline - loop.time()
            ended, waiting = await asyncio.wait(
                waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if not ended:
                raise TimeoutError(f"{len(waiting)} tasks have not ended in {timeout:g} s")
            for each in ended:
                yield await each
    finally:
        for each in waiting:
            each.cancel()


async def _end_of(result: AsyncResult) -> Handle:
    made = handle(result)
    if not isinstance(made, EagerHandle):
        async with reader_of(made.app).follow(made.id) as events:
            async for _ in events:
                pass
    return made
