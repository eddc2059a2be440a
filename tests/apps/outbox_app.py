"""Tasks that are counted, and processes that publish them on commit.

`python outbox_app.py COUNT` commits that often and says each id; with `die` each time in a process
that is killed after the commit.
"""

import asyncio
import os
import signal
import sys
import time
from typing import Any

from celery import Celery
from celery.utils import uuid
from fastapi import FastAPI
from redis import Redis
from sqlalchemy import Column, Integer, MetaData, String, Table, select
from sqlalchemy.orm import Session

import celeriac
from celeriac import relay
from celeriac.database import Database
from celeriac.outbox import Outbox, outbox_table, use_outbox
from celeriac.store import redis_url

celery = Celery("outbox_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
celery.conf.update(
    {"task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1}
)
if queue := os.environ.get("QUEUE"):
    celery.conf.task_default_queue = queue
if pool := os.environ.get("WORKER_POOL"):
    celery.conf.worker_pool = pool
celeriac.adopt(celery, lease=2)
database = Database(os.environ["DATABASE_URL"])
use_outbox(celery, database, relayed="RELAYED" in os.environ)
metadata = MetaData()
outbox_table(metadata)
orders = Table(
    "orders", metadata, Column("id", Integer, primary_key=True), Column("task_id", String(64))
)
client = Redis.from_url(redis_url(os.environ["BACKEND"]))


@celery.task(bind=True)
def count(self: Any, value: int) -> int:
    client.rpush("runs", self.request.id)
    client.rpush("values", value)
    return value


@celery.task
def add(x: int, y: int) -> int:
    client.rpush("runs", "add")
    return x + y


@celery.task
def total(values: list[int]) -> int:
    client.rpush("runs", "total")
    return sum(values)


@celery.task(bind=True)
async def ship(self: Any) -> bool:
    """Whether its order is there."""
    async with database.async_session() as session:
        found = await session.scalar(select(orders.c.id).where(orders.c.task_id == self.request.id))
    client.rpush("runs" if found else "missing", self.request.id)
    return found is not None


web = FastAPI()


@web.post("/orders")
async def order(then: str = "") -> None:
    task_id = uuid()
    async with database.async_session() as session:
        await session.execute(orders.insert().values(task_id=task_id))
        ship.apply_async_on_commit(session, task_id=task_id)
        if then == "savepoint":
            nested = await session.begin_nested()
            ship.delay_on_commit(session)
            await nested.rollback()
        elif then == "rollback":
            await session.rollback()
        elif then == "raise":
            raise RuntimeError(then)
        elif then == "wait":
            await asyncio.sleep(0.3)
        await session.commit()


@web.post("/sync-orders")
def sync_order(then: str = "") -> None:
    task_id = uuid()
    with database.session() as session, session.begin():
        session.execute(orders.insert().values(task_id=task_id))
        ship.apply_async_on_commit(session, task_id=task_id)
        if then == "savepoint":
            with session.begin_nested() as nested:
                ship.delay_on_commit(session)
                nested.rollback()
        elif then == "rollback":
            session.rollback()
        elif then == "raise":
            raise RuntimeError(then)
        elif then == "wait":
            time.sleep(0.3)


async def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _commit(value: int) -> None:
    with Session(database.engine) as session:
        print(count.delay_on_commit(session, value).id, flush=True)
        session.commit()


def _commit_and_die(value: int) -> None:
    """In a child that is killed after the commit: before it sends, or before it removes the row."""
    if (child := os.fork()) == 0:
        if value % 2:
            relay.send = _die  # type: ignore[assignment]
            _commit(value)
        else:
            Outbox.remove = _die  # type: ignore[method-assign, assignment]
            _commit(value)
            signal.pause()
    os.waitpid(child, 0)


if __name__ == "__main__":
    for value in range(int(sys.argv[1])):
        (_commit_and_die if "die" in sys.argv else _commit)(value)
