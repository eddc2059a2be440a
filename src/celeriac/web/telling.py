"""What happens to a task, as those are told who ask over HTTP."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import replace

from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.status import HINT_AFTER, Event, Reader, Status
from celeriac.web.shown import matches

_FIRST_EVENT = 5.0  # seconds; a status store that is silent for longer is away


async def wait(
    reader: Reader, task: Status, within: AbstractAsyncContextManager[object], seen: Collection[str]
) -> Status:
    """The state once it is none of those `seen`, or the last; the present one in the end.

    `within` raises TimeoutError inside when that is.
    """
    current = task
    with suppress(TimeoutError, UnknownTaskError):
        async with within, aclosing(told(reader, task.task_id)) as events:
            async for event in events:
                if isinstance(event, Status):
                    current = await reader.with_hint(replace(event, record=task.record))
                    if current.terminal or (seen and not matches(current, seen)):
                        break
    return current


async def told(
    reader: Reader, task_id: str, after: int | None = None
) -> AsyncGenerator[Status | Event]:
    """What happens to a task; and once, if nothing does and it is PENDING, why.

    Raises UnknownTaskError, and ServiceError if the status store does not begin to tell.
    """
    async with reader.follow(task_id, after) as events:
        pending = True
        if after is None:  # else there may be nothing to tell for long
            try:
                async with asyncio.timeout(_FIRST_EVENT):
                    first = await anext(events, None)
            except TimeoutError:
                raise ServiceError("the status store does not tell") from None
            if first is not None:
                yield first
            pending = first is not None and first.state == "PENDING"
        if pending:
            upcoming = asyncio.create_task(_next_of(events), name="celeriac-upcoming")
            try:
                ended, _ = await asyncio.wait([upcoming], timeout=HINT_AFTER)
                hint = None if ended else await _hint(reader, task_id)
                if hint is not None and not upcoming.done():
                    yield hint
                event = await upcoming
            finally:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
            if event is not None:
                yield event
        async for event in events:
            yield event


async def _hint(reader: Reader, task_id: str) -> Status | None:
    with suppress(ServiceError, UnknownTaskError):
        found = await reader.with_hint(await reader.snapshot(task_id))
        if found.waiting is not None:
            return found
    return None


async def _next_of(events: AsyncIterator[Status | Event]) -> Status | Event | None:
    return await anext(events, None)
