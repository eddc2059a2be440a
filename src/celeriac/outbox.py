"""Messages as rows of the caller's transaction: a table, and who may send what is in it.

A row is claimed for a while, so that one process at a time sends it: by who inserts it, and when
that one has died, or the broker was away, by a relay.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from celery.canvas import Signature
from sqlalchemy import (
    CTE,
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement

from celeriac.database import Database

TABLE = "celeriac_outbox"
OWN = 0.75  # seconds from the insertion in which nobody else sends a row
CLAIM = 2.0  # seconds in which nobody else sends what a relay has taken
_BATCH = 100  # rows
# An id is never used again: whoever is late to remove a row must not remove another one.
_OPTIONS: dict[str, Any] = {"sqlite_autoincrement": True}


class _Now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, which all who claim rows share."""

    type = Double()
    inherit_cache = True


@compiles(_Now, "sqlite")
def _now_in_sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Now, "postgresql")
def _now_in_postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def _columns() -> list[Column[Any]]:
    number = BigInteger().with_variant(Integer, "sqlite")
    return [
        Column("id", number, primary_key=True, autoincrement=True),
        Column("task_id", String(255), nullable=False),
        Column("signature", Text, nullable=False),  # Celery's, as JSON
        Column("ordering_key", String(255)),
        # Until when somebody is about to send it, in seconds since 1970.
        Column("claimed_until", Double, nullable=False),
    ]


_INDEXED = {"claimed_until": ["claimed_until"], "ordering_key": ["ordering_key", "id"]}


def outbox_table(metadata: MetaData, name: str = TABLE) -> Table:
    """The table of messages that wait; in your models' metadata, migrations find it there."""
    if (found := metadata.tables.get(name)) is not None:
        return found
    table = Table(name, metadata, *_columns(), **_OPTIONS)
    for first, columns in _INDEXED.items():
        Index(f"ix_{name}_{first}", *(table.c[column] for column in columns))
    return table


def create_outbox(op: Any, name: str = TABLE) -> None:
    """The table, in an Alembic migration: `create_outbox(op)`."""
    op.create_table(name, *_columns(), **_OPTIONS)
    for first, columns in _INDEXED.items():
        op.create_index(f"ix_{name}_{first}", name, columns)


def drop_outbox(op: Any, name: str = TABLE) -> None:
    """The way back."""
    op.drop_table(name)


@dataclass(slots=True)
class Row:
    """A message that waits in the outbox."""

    id: int
    task_id: str
    signature: str
    ordering_key: str | None
    made: Signature | None = None  # what that is the text of, where it was made in this process


class Outbox:
    """That of one app. See `use_outbox`."""

    def __init__(self, database: Database, table: Table, *, relayed: bool) -> None:
        self.database, self.relayed = database, relayed
        self._table = table
        # Made once: to build them is half of what they cost.
        made = [insert(table).values(claimed_until=_Now() + wait) for wait in (OWN, 0.0)]
        own, free = (each.returning(table.c.id, sort_by_parameter_order=True) for each in made)
        self._insert = {False: free if relayed else own, True: free}  # by whether there is a key

    def insert(self, session: Session, messages: Sequence[dict[str, Any]]) -> list[Row]:
        """Add rows of `task_id`, `signature` and `ordering_key` to the session's transaction."""
        rows: list[Row] = []
        # Not through the session's own `execute`, which does as much again for models.
        connection = session.connection({"clause": self._table})
        for ordered, group in groupby(messages, lambda each: each["ordering_key"] is not None):
            some = list(group)
            ids = connection.scalars(self._insert[ordered], some if len(some) > 1 else some[0])
            rows += [Row(number, **each) for number, each in zip(ids, some, strict=True)]
        # Commits that notify wait for each other in PostgreSQL: not where it is sent right after.
        if self.relayed and connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_notify(TABLE, "")))
        return rows

    async def take(self) -> list[Row]:
        """Claim rows that nobody is about to send, the oldest first."""
        table, engine = self._table, self.database.async_engine
        free = table.c.claimed_until < _Now()
        async with engine.connect() as connection:
            # Without a lock: with an UPDATE the writers of SQLite would wait for each other.
            if (await connection.execute(select(table.c.id).where(free).limit(1))).first() is None:
                return []
        due = self._due()
        claim = update(table).where(table.c.id.in_(select(due.c.id)), free)
        claim = claim.values(claimed_until=_Now() + CLAIM)
        columns = table.c.id, table.c.task_id, table.c.signature, table.c.ordering_key
        claimed = [Row(*each) for each in await self._write(claim.returning(*columns))]
        return sorted(claimed, key=lambda row: row.id)

    def _due(self) -> CTE:
        table, earlier = self._table, self._table.alias()
        # Of those with one key the first: until it is removed, the others wait.
        follows = exists().where(
            earlier.c.ordering_key == table.c.ordering_key, earlier.c.id < table.c.id
        )
        due = select(table.c.id).where(
            table.c.claimed_until < _Now(), or_(table.c.ordering_key.is_(None), ~follows)
        )
        due = due.order_by(table.c.id).limit(_BATCH)
        return due.with_for_update(skip_locked=True, of=table).cte("due")

    async def remove(self, ids: Iterable[int]) -> None:
        """Of what was sent."""
        await self._write(delete(self._table).where(self._table.c.id.in_(ids)))

    async def put_off(self, row: Row, seconds: float) -> None:
        """Let nobody try to send it for a while."""
        later = update(self._table).where(self._table.c.id == row.id)
        await self._write(later.values(claimed_until=_Now() + seconds))

    async def _write(self, statement: Any) -> Any:
        # Not `begin`, an asynchronous generator, which the end of a loop would close in the middle.
        async with self.database.async_engine.connect() as connection:
            result = await connection.execute(statement)
            await connection.commit()
            return result

    @asynccontextmanager
    async def told(self) -> AsyncIterator[AsyncIterator[Any] | None]:
        """What the database tells of messages that are left to the relay; None if it does not."""
        engine = self.database.async_engine
        if engine.dialect.driver != "psycopg" or engine.dialect.name != "postgresql":
            yield None
            return
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.set_autocommit(True)
            await driver.execute(f"LISTEN {TABLE}")
            try:
                yield driver.notifies()
            finally:
                await connection.invalidate()  # it listens: no other use may get it


_outboxes: WeakKeyDictionary[Celery, Outbox] = WeakKeyDictionary()


def use_outbox(
    app: Celery, database: Database, *, table: Table | None = None, relayed: bool = False
) -> None:
    """Keep what is published on commit in a table until the broker has it.

    The sessions given to `delay_on_commit` write to `database`, which has the table: see
    `outbox_table` and `create_outbox`. `celeriac relay` sends what a process has left that died.
    `relayed` leaves all of it to the relay: then only that one needs the broker.
    """
    table = outbox_table(MetaData()) if table is None else table
    _outboxes[app] = Outbox(database, table, relayed=relayed)


def outbox_of(app: Celery) -> Outbox | None:
    return _outboxes.get(app)
