"""FastAPI's edge: the application's Celery app in every request, and live status of its tasks."""

from celeriac.fastapi.app import AppContextMiddleware, attach
from celeriac.fastapi.idempotency import Idempotency, IdempotencyDep
from celeriac.fastapi.origins import SameOriginMiddleware, same_origin
from celeriac.fastapi.owners import PUBLIC, ReadTokens, owned_by, public
from celeriac.fastapi.routes import status_router
from celeriac.fastapi.views import ReaderDep, TaskId, TaskStatus, find_task, shown_error

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
