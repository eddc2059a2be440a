"""Sessions from one URL, on every database; migrations; forks."""

import asyncio
import os
import secrets
import select
import shutil
import sqlite3
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pytest
from celery import Celery
from celery.exceptions import Retry
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from celeriac import ConfigurationError, adopt, bridge
from celeriac.database import Database
from support import REFERENCE, clean_environment, given, run_python, wanted


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    yield database
    database.dispose()


def count(database: Database) -> int:
    with database.session() as session:
        found: int = session.execute(text("SELECT count(*) FROM t")).scalar_one()
        return found


def test_p21_sync_and_async_sessions_see_each_others_commits(database: Database) -> None:
    with database.session() as session:
        session.execute(text("INSERT INTO t VALUES (1)"))
        session.commit()

    async def add() -> int:
        async with database.async_session() as session:
            await session.execute(text("INSERT INTO t VALUES (2)"))
            await session.commit()
            found: int = (await session.execute(text("SELECT count(*) FROM t"))).scalar_one()
        await database.adispose()
        return found

    assert asyncio.run(add()) == 2
    assert asyncio.run(add()) == 3  # another event loop has an engine of its own
    assert count(database) == 3


def test_a_session_that_was_not_committed_leaves_nothing(database: Database) -> None:
    with database.session() as session:
        session.execute(text("INSERT INTO t VALUES (1)"))
    with suppress(ZeroDivisionError), database.session() as session:
        session.execute(text("INSERT INTO t VALUES (1)"))
        raise ZeroDivisionError
    assert count(database) == 0


def test_a_forked_child_has_connections_of_its_own_and_leaves_the_parents_alone(
    database: Database,
) -> None:
    with database.session() as session:
        session.execute(text("INSERT INTO t VALUES (1)"))
        child = os.fork()
        if child == 0:  # the parent's transaction is open; the child must not see or end it
            try:
                os._exit(count(database))
            except BaseException:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        session.commit()
    assert count(database) == 1


def test_an_unreadable_url_and_an_unknown_driver_are_one_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL is no URL"):
        Database("not a url")
    with pytest.raises(ConfigurationError, match="no driver for nosuch databases"):
        _ = Database("nosuch://host/name").engine


def test_many_threads_share_one_engine(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    with ThreadPoolExecutor(20) as pool:
        engines = list(pool.map(lambda _: database.engine, range(200)))
    assert len(set(engines)) == 1
    database.dispose()


def alembic(url: str, *command: str) -> str:
    done = run_python(
        *("-m", "alembic", *command), cwd=REFERENCE, env=clean_environment(DATABASE_URL=url)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_p24_migrations_make_what_the_models_say_and_go_back(database_url: str) -> None:
    alembic(database_url, "upgrade", "head")
    assert "No new upgrade operations detected" in alembic(database_url, "check")
    alembic(database_url, "downgrade", "base")
    alembic(database_url, "upgrade", "head")


def test_p26_autogenerate_finds_the_models_of_every_feature(
    database_url: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(REFERENCE, copy, ignore=shutil.ignore_patterns("tests", "*.sqlite3*"))
    for migration in (copy / "alembic" / "versions").glob("*.py"):
        migration.unlink()
    feature = copy / "project" / "orders"
    feature.mkdir()
    for name in ("__init__", "tasks"):
        (feature / f"{name}.py").touch()
    (feature / "models.py").write_text(
        "from sqlalchemy.orm import Mapped, mapped_column\n"
        "from project.database import Base\n"
        "class Order(Base):\n"
        "    __tablename__ = 'orders'\n"
        "    id: Mapped[int] = mapped_column(primary_key=True)\n"
    )
    init = copy / "project" / "__init__.py"
    init.write_text(init.read_text().replace('["users"]', '["users", "orders"]'))
    done = run_python(
        *("-m", "alembic", "revision", "--autogenerate", "-m", "all"),
        cwd=copy,
        env=clean_environment(DATABASE_URL=database_url),
    )
    assert done.returncode == 0, done.stderr
    (made,) = (copy / "alembic" / "versions").glob("*.py")
    assert '"users"' in made.read_text().replace("'", '"')
    assert '"orders"' in made.read_text().replace("'", '"')


@pytest.mark.parametrize("_", wanted("postgresql", "TEST_DATABASE_URL"))
def test_p25_a_password_with_an_escaped_at_sign_reaches_postgresql(_: str) -> None:
    server = make_url(given("TEST_DATABASE_URL"))
    address = server.set(drivername="postgresql").render_as_string(hide_password=False)
    role = f"celeriac_{secrets.token_hex(4)}"
    with psycopg.connect(address, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'p@ss%word'")
        admin.execute(f"CREATE DATABASE {role} OWNER {role}")
        try:
            url = f"postgresql://{role}:p%40ss%25word@{server.host}:{server.port or 5432}/{role}"
            alembic(url, "upgrade", "head")
            database = Database(url)
            assert database.url.password == "p@ss%word"
            with database.session() as session:
                assert session.execute(text("SELECT count(*) FROM users")).scalar_one() == 0
            database.dispose()
        finally:
            admin.execute(f"DROP DATABASE {role} WITH (FORCE)")
            admin.execute(f"DROP ROLE {role}")


OUTCOMES = {"success": (None, 1), "error": (ZeroDivisionError, 0), "retry": (Retry, 0)}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_in_a_task_a_session_commits_unless_an_error_or_a_retry_ends_it(
    kind: str, outcome: str, database: Database
) -> None:
    app = adopt(Celery("sessions", broker="memory://", backend="cache+memory://"))
    error, expected = OUTCOMES[outcome]
    insert = text("INSERT INTO t VALUES (1)")
    used: list[Session] = []

    @app.task(shared=False)
    def add() -> None:
        with database.session() as session:
            used.append(session)
            session.execute(insert)
            if error is not None:
                raise error

    @app.task(shared=False)
    async def add_async() -> None:
        try:
            async with database.async_session() as session:
                used.append(session.sync_session)
                await session.execute(insert)
                if error is not None:
                    raise error
        finally:
            await database.adispose()

    (add if kind == "sync" else add_async).apply()
    bridge.close()
    assert count(database) == expected
    assert used[0].get_bind() is not None
    assert not used[0].in_transaction()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_commit_that_fails_locks_nobody_out(kind: str, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    with database.session() as session:
        session.execute(text("CREATE TABLE p (id INTEGER PRIMARY KEY)"))
        session.execute(text("CREATE TABLE c (id REFERENCES p (id) DEFERRABLE INITIALLY DEFERRED)"))
        session.commit()

    def write() -> None:
        with closing(sqlite3.connect(tmp_path / "a.sqlite3", timeout=0.1)) as other:
            other.execute("INSERT INTO p VALUES (2)")

    async def violate() -> None:
        async with database.async_session() as session:
            await session.execute(text("INSERT INTO c VALUES (1)"))
            with pytest.raises(IntegrityError):
                await session.commit()
        write()
        await database.adispose()

    if kind == "async":
        asyncio.run(violate())
    else:
        with database.session() as session:
            session.execute(text("INSERT INTO c VALUES (1)"))
            with pytest.raises(IntegrityError):
                session.commit()
        write()
    database.dispose()


def test_no_connection_is_no_bound_and_one_in_memory_has_none() -> None:
    with pytest.raises(ConfigurationError, match="max_connections: expected at least 1, got 0"):
        Database("sqlite://", max_connections=0)
    memory = Database("sqlite://", max_connections=2)
    with memory.session() as session:
        assert session.execute(text("SELECT 1")).scalar_one() == 1
    memory.dispose()


CHILDREN, QUERIES, CONNECTIONS = 8, 500, 3


def query_much(database: Database) -> None:
    """Half with each kind of session, from more threads and coroutines than connections."""
    statement = text("SELECT x FROM t")

    def query(_: int) -> int:
        with database.session() as session:
            found: int = session.execute(statement).scalar_one()
            return found

    async def query_async() -> list[int]:
        async def query() -> int:
            async with database.async_session() as session:
                found: int = (await session.execute(statement)).scalar_one()
                return found

        found = await asyncio.gather(*(query() for _ in range(QUERIES // 2)))
        await database.adispose()
        return found

    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(query, range(QUERIES // 2)))
    assert found + asyncio.run(query_async()) == [1] * QUERIES


def test_an_engine_made_before_many_forks_serves_them_all_within_its_bound(
    database_url: str,
) -> None:
    on_server = database_url.startswith("postgresql")
    name = {"application_name": f"bound-{os.getpid()}"} if on_server else {}
    database = Database(database_url, max_connections=CONNECTIONS, connect_args=name)
    with database.session() as session:
        session.execute(text("CREATE TABLE t (x INTEGER)"))
        session.execute(text("INSERT INTO t VALUES (1)"))
        session.commit()
    done, tell = os.pipe()
    wait, go = os.pipe()
    children = []
    for _ in range(CHILDREN):
        if (child := os.fork()) == 0:
            os.close(go)
            failed = True
            try:
                query_much(database)
                failed = False
            except BaseException:
                traceback.print_exc()
            os.write(tell, b".")
            os.read(wait, 1)  # until the parent has looked
            os._exit(failed)
        children.append(child)
    os.close(wait)
    seen = []
    for _ in range(CHILDREN):
        while not select.select([done], [], [], 0.05)[0]:
            seen.append(connections(database, *name.values()))
        os.read(done, 1)
    at_the_end = connections(database, *name.values())
    os.close(go)
    for end in (done, tell):
        os.close(end)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    database.dispose()
    assert codes == [0] * CHILDREN
    if on_server:
        kinds, parent = 2, 1
        assert 0 < max(number for number, _ in seen) <= CHILDREN * kinds * CONNECTIONS + parent
        assert at_the_end[1] == 0


def connections(database: Database, name: str = "") -> tuple[int, int]:
    """How many a PostgreSQL has of this name, and how many of them are idle in a transaction."""
    if not name:
        return 0, 0
    address = database.url.render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        states = connection.execute(
            "SELECT state FROM pg_stat_activity WHERE application_name = %s", [name]
        ).fetchall()
    return len(states), sum("in transaction" in (state or "") for (state,) in states)
