"""Tasks in the views of an application, as `attach` gives it its Celery app."""

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from fastapi import Depends, HTTPException, status
from starlette.requests import HTTPConnection

from celeriac.errors import UnknownTaskError
from celeriac.fastapi.owners import checked
from celeriac.status import Reader, Status, reader_of
from celeriac.web.owners import Owner, may_see
from celeriac.web.shown import UNKNOWN


async def _reader(connection: HTTPConnection) -> Reader:
    return reader_of(connection.app.celery)


ReaderDep = Annotated[Reader, Depends(_reader)]
"""Task states in a view of an application that was given its Celery app with `attach`."""


async def find_task(reader: Reader, task_id: str, owner: Owner, *, unowned: bool = False) -> Status:
    """The state of a task, if `owner`, as a policy gives it, may see it.

    Raises HTTPException 404 else, the same for a task that is not known and for somebody else's.
    `unowned`: as in `status_router`.
    """
    checked(owner)
    return await visible(
        reader, task_id, lambda found: may_see(owner, found.record, unowned=unowned)
    )


async def visible(reader: Reader, task_id: str, allows: Callable[[Status], bool]) -> Status:
    with suppress(UnknownTaskError):
        found = await reader.snapshot(task_id)
        if allows(found):
            return found
    raise HTTPException(status.HTTP_404_NOT_FOUND, UNKNOWN)
