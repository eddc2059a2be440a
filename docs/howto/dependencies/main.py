"""A view and a task that ask for a session in the same words."""

import os
from collections.abc import Iterator
from typing import Annotated

from celery import Celery
from fastapi import Depends, FastAPI
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import celeriac
from celeriac.database import Database
from celeriac.fastapi import attach
from celeriac.inject import injected

redis_url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
database = Database(os.environ.get("DATABASE_URL", "sqlite:///app.db"), max_connections=5)
celery = celeriac.adopt(Celery("worker", broker=redis_url, backend=redis_url))
app = FastAPI()
attach(app, celery)


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    paid: Mapped[bool] = mapped_column(default=False)


def get_session() -> Iterator[Session]:
    with database.session() as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]


@celery.task(autoretry_for=(OperationalError,), retry_backoff=True)
def pay(order_id: int, session: SessionDep = injected) -> None:
    session.get_one(Order, order_id).paid = True  # committed when the body has ended


@app.post("/orders", status_code=202)
def create(session: SessionDep) -> int:
    order = Order()
    session.add(order)
    session.commit()
    pay.delay(order.id)
    return order.id
