"""Engines and sessions from one URL: synchronous and asynchronous, made after the fork."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from celery._state import get_current_task
from sqlalchemy import URL, Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from celeriac.errors import ConfigurationError

# What a URL's driver is where the other kind of session is asked for.
_SYNC = {
    "sqlite+aiosqlite": "sqlite",
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg2": "postgresql+psycopg",
}
_ASYNC = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+pysqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg2": "postgresql+psycopg",
}


MAX_CONNECTIONS = 10
_KEPT_OPEN = 5  # of them, while nobody uses them, as SQLAlchemy does


class Database:
    """One database for views and tasks, SQLite or PostgreSQL.

    Engines are made when first used, in the process that uses them: one made before a fork would
    share its sockets with the child. The asynchronous one is made for each event loop.

    `max_connections` is the most that one engine opens; who wants another waits for up to 30
    seconds. A process has one engine for synchronous sessions and one for asynchronous ones, as
    far as it uses them, so that a server sees at most

        max_connections x kinds of session (1 or 2) x processes

    A web server with 4 processes and a prefork worker with 8 children, all with both kinds, are
    12 processes: 240 connections with the default of 10, and PostgreSQL allows 100 unless told
    otherwise. A prefork child runs one task at a time and opens but one or two of them.

    Raises ConfigurationError for a URL that SQLAlchemy cannot read, and for no connections.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        connect_args: Mapping[str, Any] | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        if not max_connections >= 1:
            raise ConfigurationError(
                f"max_connections: expected at least 1, got {max_connections!r}"
            )
        try:
            self.url = make_url(url)
        except ArgumentError:
            raise ConfigurationError(
                "DATABASE_URL is no URL: expected e.g. sqlite:///app.db or "
                "postgresql://user:password@host/name, with @ in a password written as %40"
            ) from None
        if self.url.drivername == "postgres":
            self.url = self.url.set(drivername="postgresql")
        self._connect_args = dict(connect_args or {})
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._async_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine]
        self._async_engines = WeakKeyDictionary()
        after_fork = WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    @property
    def engine(self) -> Engine:
        with self._lock:
            if self._engine is None:
                engine: Engine = self._create(create_engine, _SYNC)
                _configure(engine)
                self._engine = engine
            return self._engine

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine of the running event loop."""
        loop = asyncio.get_running_loop()
        engine = self._async_engines.get(loop)
        if engine is None:
            engine = self._async_engines[loop] = self._create(create_async_engine, _ASYNC)
            _configure(engine.sync_engine)
        return engine

    def _create(self, create: Any, drivers: Mapping[str, str]) -> Any:
        url = self.url.set(drivername=drivers.get(self.url.drivername, self.url.drivername))
        try:
            return create(
                url, connect_args=self._connect_args, pool_pre_ping=True, **self._bounds(url)
            )
        except (NoSuchModuleError, ModuleNotFoundError, ArgumentError) as error:
            raise ConfigurationError(
                f"no driver for {url.drivername} databases here ({error}): "
                "SQLite and PostgreSQL (psycopg) are supported"
            ) from None

    def _bounds(self, url: URL) -> dict[str, int]:
        dialect: Any = url.get_dialect()
        if not issubclass(dialect.get_pool_class(url), QueuePool):
            return {}  # a database in memory
        kept = min(_KEPT_OPEN, self._max_connections)
        return {"pool_size": kept, "max_overflow": self._max_connections - kept}

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that is closed at the end.

        In a task it is committed, unless an error or a retry ends the block. Elsewhere it is
        rolled back unless it was committed: a view has to know before it answers.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            yield session
            if get_current_task() is not None:
                session.commit()

    @asynccontextmanager
    async def async_session(self) -> AsyncIterator[AsyncSession]:
        """The same on the event loop."""
        async with AsyncSession(self.async_engine, expire_on_commit=False) as session:
            yield session
            if get_current_task() is not None:
                await session.commit()

    def dispose(self) -> None:
        """Close the synchronous engine's connections."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    async def adispose(self) -> None:
        """Close the running loop's connections, and the synchronous engine's."""
        engine = self._async_engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.dispose()
        self.dispose()

    def _after_fork(self) -> None:
        """Let go of the parent's connections without closing them: they are still in use there."""
        self._lock = threading.Lock()  # one of the parent's other threads may have held it
        engines = [engine.sync_engine for engine in self._async_engines.values()]
        if self._engine is not None:
            engines.append(self._engine)
        for engine in engines:
            engine.dispose(close=False)
        self._engine = None
        self._async_engines = WeakKeyDictionary()


def _configure(engine: Engine) -> None:
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        # Web and worker write to one file: readers do not wait, writers wait for each other.
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA busy_timeout = 5000")
        cursor.close()

    @event.listens_for(engine, "checkin")
    def returned(connection: Any, record: Any) -> None:
        # A commit that fails leaves SQLite's transaction open, and with it everybody else locked
        # out, while SQLAlchemy takes it for ended.
        if connection is not None and record.driver_connection.in_transaction:
            connection.rollback()
