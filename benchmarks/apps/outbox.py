"""A row and a task in one unit of work: sent after the commit, with it, or through the outbox."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Column, Integer, MetaData, String, Table, insert
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.apps.ours import app, noop
from celeriac.database import Database
from celeriac.outbox import outbox_table, use_outbox

Send = Callable[[Any], Awaitable[Any]]

metadata = MetaData()
work = Table("work", metadata, Column("id", Integer, primary_key=True), Column("text", String(200)))
outbox_table(metadata)
database = Database(os.environ["BENCH_DATABASE_URL"])
_THREADS = 8


@asynccontextmanager
async def _ready(send: Send) -> AsyncIterator[Send]:
    metadata.drop_all(database.engine)
    metadata.create_all(database.engine)
    yield send
    await database.adispose()


async def _write(session: AsyncSession, payload: str) -> None:
    await session.execute(insert(work).values(text=payload))


def commit_only(_: str) -> Any:
    async def send(payload: str) -> None:
        async with database.async_session() as session:
            await _write(session, payload)
            await session.commit()

    return _ready(send)


def delay_after(_: str) -> Any:
    """As it is written by hand: what dies in between loses the message."""

    async def send(payload: str) -> None:
        async with database.async_session() as session:
            await _write(session, payload)
            await session.commit()
        await noop.adelay(payload)

    return _ready(send)


def on_commit(_: str) -> Any:
    async def send(payload: str) -> None:
        async with database.async_session() as session:
            await _write(session, payload)
            noop.delay_on_commit(session, payload)
            await session.commit()

    return _ready(send)


def outbox(_: str) -> Any:
    use_outbox(app, database)
    return on_commit(_)


def relayed(_: str) -> Any:
    use_outbox(app, database, relayed=True)
    return on_commit(_)


def outbox_in_threads(_: str) -> Any:
    use_outbox(app, database)
    threads = ThreadPoolExecutor(_THREADS)

    def commit(payload: str) -> None:
        with database.session() as session:
            session.execute(insert(work).values(text=payload))
            noop.delay_on_commit(session, payload)
            session.commit()

    async def send(payload: str) -> None:
        await asyncio.get_running_loop().run_in_executor(threads, commit, payload)

    return _ready(send)
