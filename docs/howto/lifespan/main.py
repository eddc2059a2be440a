"""A worker whose tasks share one HTTP client, and with it its connections."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from celery import Celery

import celeriac
from celeriac.task import Task

redis_url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")


@asynccontextmanager
async def lifespan(app: Celery) -> AsyncIterator[None]:
    async with httpx.AsyncClient(timeout=5) as client:
        app.http = client
        yield


celery = celeriac.adopt(Celery("worker", broker=redis_url, backend=redis_url), lifespan=lifespan)
celery.conf.worker_pool = "celeriac.pool:TaskPool"


@celery.task(bind=True, autoretry_for=(httpx.TransportError,), retry_backoff=True)
async def fetch(self: Task, url: str) -> int:
    response = await self.app.http.get(url)
    return int(response.status_code)
