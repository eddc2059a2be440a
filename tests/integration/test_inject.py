"""Dependencies of tasks in workers of every pool: a session ends before the outcome is stored."""

import os
from collections.abc import Iterator

import pytest
from celery import chain
from sqlalchemy import text

from celeriac.database import Database
from celeriac.embedded import Valkey
from celeriac.errors import ArgumentError
from support import empty_redis, eventually
from workers import POOLS, Worker


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('inject') / 'test.sqlite3'}")
    with database.session() as session:
        for statement in (
            "CREATE TABLE t (x INTEGER)",
            "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
            "CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)",
        ):
            session.execute(text(statement))
        session.commit()
    yield database
    database.dispose()


@pytest.fixture(scope="module", params=list(POOLS))
def worker(request: pytest.FixtureRequest, valkey: Valkey, database: Database) -> Iterator[Worker]:
    empty_redis(valkey.celery_url)
    url = database.url.render_as_string()
    with Worker(
        "inject_app", request.param, valkey.celery_url, valkey.celery_url, DATABASE=url
    ) as running:
        yield running


@pytest.fixture
def x(database: Database) -> int:
    """A number that no other test adds."""
    return int.from_bytes(os.urandom(4))


def added(database: Database, x: int) -> int:
    with database.session() as session:
        found: int = session.execute(
            text("SELECT count(*) FROM t WHERE x = :x"), {"x": x}
        ).scalar_one()
        return found


@pytest.mark.parametrize(
    "name", ["add", "add_sync", "add_in_threads", "add_foreign", "add_foreign_sync"]
)
def test_what_a_task_wrote_is_committed_when_its_success_is_seen(
    name: str, worker: Worker, database: Database, x: int
) -> None:
    assert worker.send(name, x).get(timeout=10) == x
    assert added(database, x) == 1


@pytest.mark.parametrize("kind", ["", "_sync"])
def test_a_retry_takes_back_what_was_written_before_it(
    kind: str, worker: Worker, database: Database, x: int
) -> None:
    assert worker.send(f"retry{kind}", x).get(timeout=20) == x
    assert added(database, x) == 1


@pytest.mark.parametrize("kind", ["", "_sync"])
def test_a_commit_that_fails_is_a_task_that_fails(kind: str, worker: Worker) -> None:
    result = worker.send(f"twice{kind}")
    assert "FOREIGN KEY" in str(result.get(timeout=10, propagate=False))
    assert result.state == "FAILURE"


@pytest.mark.parametrize("kind", ["", "_sync"])
def test_the_current_task_is_the_dependencys_too(kind: str, worker: Worker) -> None:
    results = [worker.send(f"who{kind}") for _ in range(10)]
    assert [result.get(timeout=10) for result in results] == [result.id for result in results]
    assert {worker.noted("left") for _ in results} == {result.id for result in results}


@pytest.mark.parametrize("kind", ["", "_sync"])
def test_types_come_from_plain_json_and_a_wrong_one_in_a_chain_is_of_who_gets_it(
    kind: str, worker: Worker
) -> None:
    line = {"ends": [1, 2], "drawn": "2026-11-20T12:00:00Z"}
    assert worker.send(f"draw{kind}", [line]).get(timeout=10) == {"0": line}
    draw = worker.signature(f"draw{kind}")
    result = chain(worker.signature(f"add{kind}", 1), draw, app=worker.client).delay()
    with pytest.raises(ArgumentError, match=f"^task inject_app.draw{kind}: lines: Input should be"):
        result.get(timeout=10)
    assert (result.parent.state, result.state) == ("SUCCESS", "FAILURE")


def test_a_body_that_is_cancelled_takes_back_what_it_wrote(
    worker: Worker, database: Database, x: int
) -> None:
    if worker.pool != "celeriac":
        return  # the others end the process, and the server takes it back
    result = worker.send("hang", x)
    assert worker.noted("hangs") == str(x)
    result.revoke(terminate=True)
    eventually(lambda: result.state == "REVOKED")
    assert added(database, x) == 0
