"""The web side, put together."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from asgi_correlation_id import CorrelationIdMiddleware
from celery import Celery
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.middleware.sessions import SessionMiddleware

from celeriac.fastapi import SameOriginMiddleware, attach, status_router
from project import logs, pages
from project.config import Config, ProductionConfig
from project.lifespan import lifespan
from project.users.views import router as users_router
from project.visitors import visitor

logger = logging.getLogger(__name__)


def build(config: Config, celery: Celery) -> FastAPI:
    @asynccontextmanager
    async def of_web(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(celery):
            yield

    # FastAPI's own pages of the API load their scripts from a CDN.
    app: FastAPI = FastAPIOffline(title="Celeriac reference system", lifespan=of_web)
    app.state.config = config
    attach(app, celery)
    app.add_middleware(SameOriginMiddleware)
    app.add_middleware(
        SessionMiddleware,
        secret_key=config.secret_key.get_secret_value(),
        session_cookie="visitor",
        same_site="lax",
    )
    app.add_middleware(CorrelationIdMiddleware)
    app.add_exception_handler(RequestValidationError, _unprocessable)
    # What went wrong in a task is shown to those who develop it, not to everybody.
    app.include_router(
        status_router(
            celery, owner=visitor, errors=config.shows_errors, unowned=config.shows_unowned
        )
    )
    app.include_router(pages.router)
    app.include_router(users_router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")

    @app.get("/health-check")
    async def health_check() -> dict[str, str]:
        return {"status": "ok"}

    logs.set_up_web(config)
    if isinstance(config, ProductionConfig) and "secret_key" not in config.model_fields_set:
        logger.warning(
            "SECRET_KEY is not set: other web processes know none of this one's visitors"
        )
    return app


async def _unprocessable(request: Request, error: Exception) -> JSONResponse:
    """422 without the input: it may be secret, and not everything in it can be sent back."""
    assert isinstance(error, RequestValidationError)
    detail = [{key: item[key] for key in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": detail}, 422)
