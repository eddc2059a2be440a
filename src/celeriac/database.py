"""Engines and sessions from one URL: synchronous and asynchronous, made after the fork."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from sqlalchemy import URL, Engine, create_engine, event, make_url
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


class Database:
    """One database for views and tasks, SQLite or PostgreSQL.

    Engines are made when first used, in the process that uses them: one made before a fork would
    share its sockets with the child. The asynchronous one is made for each event loop.

    Raises ConfigurationError for a URL that SQLAlchemy cannot read.
    """

    def __init__(self, url: str | URL, *, connect_args: Mapping[str, Any] | None = None) -> None:
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
            return create(url, connect_args=self._connect_args, pool_pre_ping=True)
        except (NoSuchModuleError, ModuleNotFoundError, ArgumentError) as error:
            raise ConfigurationError(
                f"no driver for {url.drivername} databases here ({error}): "
                "SQLite and PostgreSQL (psycopg) are supported"
            ) from None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that is closed at the end, rolled back unless it was committed."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def async_session(self) -> AsyncIterator[AsyncSession]:
        """The same on the event loop."""
        async with AsyncSession(self.async_engine, expire_on_commit=False) as session:
            yield session

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
