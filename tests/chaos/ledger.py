"""What the tasks did, written by themselves as they did it, and read by the test.

In PostgreSQL where there is one, else in a file: a line added with O_APPEND is whole, needs no lock
among processes and outlives the process that wrote it, which is all that is asked of it.
"""

import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

_OVERLAP = 1000  # rows that are read again: those of others may have been committed later


@dataclass(frozen=True)
class Entry:
    """`event` is `begin`, `end`, `callback`, `errback` or what else a task has to say."""

    book: str  # one per test
    key: str  # of the piece of work, whoever does it, however often
    event: str
    run: str  # another one each time that the body runs
    task_id: str
    pid: int
    at: float


_COLUMNS = ", ".join(field.name for field in fields(Entry))


class Ledger(ABC):
    """`at` says where: the URL of a database, or a path."""

    @staticmethod
    def open(at: str, book: str) -> "Ledger":
        return DatabaseLedger(at, book) if "://" in at else FileLedger(at, book)

    def __init__(self, at: str, book: str) -> None:
        self.at, self.book = at, book

    def write(self, key: str, event: str, run: str, task_id: str) -> None:
        """Returns when the entry is there, whatever becomes of this process."""
        self._write(Entry(self.book, key, event, run, task_id, os.getpid(), time.time()))

    @abstractmethod
    def _write(self, entry: Entry) -> None: ...

    @abstractmethod
    def entries(self) -> list[Entry]:
        """All of this book, in the order in which they were written, nearly."""

    def ended(self) -> set[str]:
        """The keys of which a run has come to its end."""
        return {entry.key for entry in self.entries() if entry.event == "end"}

    def close(self) -> None:  # noqa: B027 (a file has nothing to close)
        pass


class FileLedger(Ledger):
    def _write(self, entry: Entry) -> None:
        line = json.dumps(asdict(entry)).encode() + b"\n"
        file = os.open(self.at, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def entries(self) -> list[Entry]:
        if not Path(self.at).exists():
            return []
        whole, _, _ = Path(self.at).read_text().rpartition("\n")  # the last may be on its way
        lines = whole.splitlines()
        found = [Entry(**json.loads(line)) for line in lines]
        return [entry for entry in found if entry.book == self.book]


class DatabaseLedger(Ledger):
    def __init__(self, at: str, book: str) -> None:
        super().__init__(at, book)
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._owner = 0
        self._seen: dict[int, Entry] = {}
        self._ended: set[str] = set()
        self._last = 0

    def _connected(self) -> "psycopg.Connection[Any]":
        if self._connection is None or self._owner != os.getpid():
            # A child of fork must not close what its parent uses: it forgets it.
            self._forgotten = self._connection
            self._connection = psycopg.connect(self.at, autocommit=True, prepare_threshold=1)
            # Processes die here, not the database.
            self._connection.execute("SET synchronous_commit = off")
            self._owner = os.getpid()
        return self._connection

    def create(self) -> None:
        self._connected().execute(
            "CREATE TABLE IF NOT EXISTS ledger (number bigserial PRIMARY KEY, book text, key text, "
            "event text, run text, task_id text, pid bigint, at double precision)"
        )

    def _write(self, entry: Entry) -> None:
        holders = ", ".join(["%s"] * len(fields(Entry)))
        with self._lock:
            self._connected().execute(
                f"INSERT INTO ledger ({_COLUMNS}) VALUES ({holders})", astuple(entry)
            )

    def entries(self) -> list[Entry]:
        with self._lock:
            self._read_on()
            return [self._seen[number] for number in sorted(self._seen)]

    def ended(self) -> set[str]:
        with self._lock:  # without going through all of them: a load asks all the time
            self._read_on()
            return self._ended.copy()

    def _read_on(self) -> None:
        rows = self._connected().execute(
            f"SELECT number, {_COLUMNS} FROM ledger WHERE book = %s AND number > %s "
            "ORDER BY number",
            (self.book, self._last - _OVERLAP),
        )
        for number, *columns in rows:
            self._seen[number] = entry = Entry(*columns)
            self._last = max(self._last, number)
            if entry.event == "end":
                self._ended.add(entry.key)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Run(NamedTuple):
    """One run of a task's body; without an `end` where it was ended from outside, or still runs."""

    key: str
    task_id: str
    pid: int
    began: float
    ended: float | None


def runs(entries: Iterable[Entry]) -> dict[str, list[Run]]:
    """By key, in the order in which they began."""
    events: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        if entry.event in ("begin", "end"):
            events[entry.run][entry.event] = entry
    found: dict[str, list[Run]] = defaultdict(list)
    for each in events.values():
        begin, end = each["begin"], each.get("end")
        found[begin.key].append(
            Run(begin.key, begin.task_id, begin.pid, begin.at, end.at if end else None)
        )
    return {key: sorted(of_key, key=lambda run: run.began) for key, of_key in found.items()}
