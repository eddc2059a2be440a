"""Tasks with dependencies, for workers of every pool; names that end in `_sync` are synchronous."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import celery as stock
from celery import Celery
from fastapi import Depends
from redis import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import celeriac
from celeriac.database import Database
from celeriac.inject import injected
from celeriac.store import redis_url
from celeriac.task import Task

celery = celeriac.adopt(
    Celery("inject_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
)
if "WORKER_POOL" in os.environ:
    celery.conf.worker_pool = os.environ["WORKER_POOL"]
notes = Redis.from_url(redis_url(os.environ["BACKEND"]))
database = Database(os.environ["DATABASE"])
ADD = text("INSERT INTO t VALUES (:x)")


def session() -> Iterator[Session]:
    with database.session() as session:
        yield session


async def async_session() -> AsyncIterator[AsyncSession]:
    async with database.async_session() as session:
        yield session


SessionDep = Annotated[Session, Depends(session)]
AsyncSessionDep = Annotated[AsyncSession, Depends(async_session)]


@dataclass
class Line:
    ends: tuple[int, int]
    drawn: datetime


@celery.task(pydantic=True)
async def draw(lines: list[Line], session: AsyncSessionDep = injected) -> dict[str, Line]:
    assert isinstance(lines[0].drawn, datetime)
    assert (await session.execute(text("SELECT 1"))).scalar_one()
    return {str(number): line for number, line in enumerate(lines)}


@celery.task(pydantic=True, bind=True)
def draw_sync(self: Task, lines: list[Line], session: SessionDep = injected) -> dict[str, Line]:
    assert isinstance(lines[0].drawn, datetime)
    assert session.execute(text("SELECT 1")).scalar_one()
    return {str(number): line for number, line in enumerate(lines)}


class Foreign(stock.Task):  # type: ignore[misc]
    """Somebody's base class that knows nothing of ours."""


@celery.task
async def add(x: int, session: AsyncSessionDep = injected) -> int:
    await session.execute(ADD, {"x": x})
    return x


@celery.task
def add_sync(x: int, session: SessionDep = injected) -> int:
    session.execute(ADD, {"x": x})
    return x


@celery.task
async def add_in_threads(x: int, session: SessionDep = injected) -> int:
    await asyncio.to_thread(session.execute, ADD, {"x": x})
    return x


@celery.task(base=Foreign)
def add_foreign_sync(x: int, session: SessionDep = injected) -> int:
    session.execute(ADD, {"x": x})
    return x


@celery.task(base=Foreign)
async def add_foreign(x: int, session: AsyncSessionDep = injected) -> int:
    await session.execute(ADD, {"x": x})
    return x


@celery.task(bind=True)
async def retry(self: Task, x: int, session: AsyncSessionDep = injected) -> int:
    await session.execute(ADD, {"x": x})
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return x


@celery.task(bind=True)
def retry_sync(self: Task, x: int, session: SessionDep = injected) -> int:
    session.execute(ADD, {"x": x})
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return x


@celery.task
async def twice(session: AsyncSessionDep = injected) -> None:
    """Violates a constraint that is looked at when it commits."""
    await session.execute(text("INSERT INTO child VALUES (1)"))


@celery.task
def twice_sync(session: SessionDep = injected) -> None:
    session.execute(text("INSERT INTO child VALUES (1)"))


async def whose() -> AsyncIterator[str]:
    """The task that it is asked for, as code on the loop sees it."""
    await asyncio.sleep(0)
    yield stock.current_task.request.id
    notes.rpush("note:left", stock.current_task.request.id)


@celery.task
async def who(owner: Annotated[str, Depends(whose)] = injected) -> str:
    return owner


@celery.task
def who_sync(owner: Annotated[str, Depends(whose)] = injected) -> str:
    return owner


@celery.task
async def hang(x: int, session: AsyncSessionDep = injected) -> None:
    await session.execute(ADD, {"x": x})
    notes.rpush("note:hangs", x)
    await asyncio.sleep(60)
