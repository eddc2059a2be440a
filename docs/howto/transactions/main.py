"""The examples of docs/howto/transactions.md, as one program that serves and works."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from celery import Celery
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import celeriac
from celeriac.database import Database
from celeriac.fastapi import attach
from celeriac.outbox import outbox_table, use_outbox


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


redis_url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
database = Database(os.environ.get("DATABASE_URL", "sqlite:///orders.sqlite3"))
celery = celeriac.adopt(Celery("orders", broker=redis_url, backend=redis_url))

outbox_table(Base.metadata)
use_outbox(celery, database)


@celery.task
async def ship(order_id: int) -> str:
    async with database.async_session() as session:
        order = await session.get_one(Order, order_id)
    return f"{order.article} is on its way"


async def new_session() -> AsyncIterator[AsyncSession]:
    async with database.async_session() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(new_session)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    Base.metadata.create_all(database.engine)
    yield
    await database.adispose()


app = FastAPI(lifespan=lifespan)
attach(app, celery)


@app.post("/orders", status_code=202)
async def order(article: str, session: SessionDep) -> dict[str, str]:
    order = Order(article=article)
    session.add(order)
    await session.flush()  # which gives it its id
    task = ship.delay_on_commit(session, order.id)
    await session.commit()
    return {"task_id": task.id}
