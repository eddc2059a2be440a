"""procrastinate: its queue is PostgreSQL; a row and a job, each committed by itself."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import procrastinate
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

url = make_url(os.environ["BENCH_DATABASE_URL"]).set(drivername="postgresql")
conninfo = url.render_as_string(hide_password=False)
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo))
metadata = MetaData()
work = Table("work", metadata, Column("id", Integer, primary_key=True), Column("text", String(200)))


@app.task
async def noop(payload: str) -> bool:
    return True


@asynccontextmanager
async def sender(_: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    engine = create_async_engine(url.set(drivername="postgresql+psycopg"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    async with app.open_async():
        if not await app.check_connection_async():  # of an earlier run it is there
            await app.schema_manager.apply_schema_async()

        async def send(payload: Any) -> None:
            async with AsyncSession(engine) as session:
                await session.execute(insert(work).values(text=payload))
                await session.commit()
            await noop.defer_async(payload=payload)

        yield send
    await engine.dispose()
