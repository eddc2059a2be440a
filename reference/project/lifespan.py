"""What a process opens before its first request or task, and closes after its last."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from celery import Celery

from celeriac import use_app
from project.database import get_database
from project.third_party import shared_client


@asynccontextmanager
async def lifespan(celery: Celery) -> AsyncIterator[None]:
    """Of a web process, or of a worker's, on the event loop of its requests or tasks."""
    async with shared_client():
        yield
    with use_app(celery):
        await get_database().adispose()
