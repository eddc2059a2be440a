"""The database: `Base` for models, and one source of sessions for views and tasks."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session

from celeriac.database import Database
from celeriac.outbox import outbox_table
from project.config import get_config


class Base(DeclarativeBase):
    # Without names, Alembic cannot change a constraint later.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


outbox_table(Base.metadata)  # of tasks that are published when a transaction commits


@cache
def _database(url: str, connect_args: str) -> Database:
    return Database(url, connect_args=json.loads(connect_args))


def get_database() -> Database:
    """The current app's database: one engine in each process, whoever asks."""
    config = get_config()
    return _database(config.database_url, json.dumps(config.database_connect_dict))


@contextmanager
def new_session() -> Iterator[Session]:
    """A session, closed at the end: committed in a task, elsewhere rolled back unless committed."""
    with get_database().session() as session:
        yield session


@asynccontextmanager
async def new_async_session() -> AsyncIterator[AsyncSession]:
    async with get_database().async_session() as session:
        yield session
