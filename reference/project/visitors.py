"""Whose tasks a browser's are: anonymous visitors, told apart by a signed cookie.

An application with users of its own gives their ids here instead.
"""

import secrets
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from celeriac.fastapi import ReaderDep, TaskId, find_task, owned_by
from celeriac.status import Status
from project.deps import ConfigDep


async def visitor(connection: HTTPConnection) -> str:
    """The visitor's name; "" for one who has not sent anything yet."""
    return str(connection.session.get("visitor", ""))


async def _known_visitor(request: Request) -> str:
    return str(request.session.setdefault("visitor", secrets.token_urlsafe(16)))


OwnTasks = Depends(owned_by(_known_visitor))
"""Of a route that sends tasks: they are the visitor's."""


async def _task(
    task_id: TaskId, reader: ReaderDep, config: ConfigDep, who: Annotated[str, Depends(visitor)]
) -> Status:
    return await find_task(reader, task_id, who, unowned=config.shows_unowned)


TaskDep = Annotated[Status, Depends(_task)]
"""A task of the visitor's; 404 for any other."""
