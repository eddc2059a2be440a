"""FastAPI's edge: the application's Celery app in every request, and live status of its tasks."""

from celeriac.fastapi.app import AppContextMiddleware, attach
from celeriac.fastapi.idempotency import Idempotency, IdempotencyDep
from celeriac.fastapi.origins import SameOriginMiddleware
from celeriac.fastapi.owners import owned_by, public
from celeriac.fastapi.routes import status_router
from celeriac.fastapi.views import ReaderDep, find_task
from celeriac.web.origins import same_origin
from celeriac.web.owners import PUBLIC, ReadTokens
from celeriac.web.shown import TaskId, TaskStatus, shown_error

__all__ = [
    "PUBLIC",
    "AppContextMiddleware",
    "Idempotency",
    "IdempotencyDep",
    "ReadTokens",
    "ReaderDep",
    "SameOriginMiddleware",
    "TaskId",
    "TaskStatus",
    "attach",
    "find_task",
    "owned_by",
    "public",
    "same_origin",
    "shown_error",
    "status_router",
]
