"""The application's Celery app in every request."""

from celery import Celery
from fastapi import FastAPI, Request, status
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from celeriac.app import use_app
from celeriac.web.shown import AWAY, TRY_AGAIN, away


def attach(app: FastAPI, celery: Celery) -> None:
    """Give `app` its Celery app: `app.celery`, `app.celery_app`, and `current_app` in requests.

    A task that cannot be sent because the broker is away answers 503 with `Retry-After`, and says
    whether it may have been accepted all the same.
    """
    app.celery = app.celery_app = celery  # type: ignore[attr-defined]
    app.add_middleware(AppContextMiddleware, celery=celery)
    for error in AWAY:
        app.add_exception_handler(error, _unavailable)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    code = status.HTTP_503_SERVICE_UNAVAILABLE
    return JSONResponse({"detail": away(error)}, code, headers=TRY_AGAIN)


class AppContextMiddleware:
    """Shared tasks called inside a request belong to the request's own Celery app."""

    def __init__(self, app: ASGIApp, celery: Celery) -> None:
        self._app, self._celery = app, celery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with use_app(self._celery):
            await self._app(scope, receive, send)
