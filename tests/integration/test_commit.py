"""Tasks that are published if and when a session commits, with and without an outbox."""

import asyncio
import datetime
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from celery import Celery, chain, chord, group, states
from redis import Redis
from sqlalchemy import Column, Integer, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celeriac import adopt, bridge
from celeriac.commit import delay_on_commit
from celeriac.database import Database
from celeriac.embedded import Valkey
from celeriac.errors import (
    ArgumentError,
    ConfigurationError,
    PublishError,
    PublishManyError,
    UnknownTaskError,
)
from celeriac.outbox import outbox_table, use_outbox
from celeriac.status import Reader
from celeriac.store import redis_url
from chaos.proxy import Proxy
from chaos.servers import RedisServer
from support import (
    CI,
    Process,
    clean_environment,
    close_results,
    empty_redis,
    eventually,
    free_port,
    given,
    is_free,
    python,
    run_python,
)
from workers import APPS, BROKERS, Worker

OUTAGE = 30.0 if CI else 3.0  # seconds

pytestmark = pytest.mark.anyio  # which skips what is no coroutine

metadata = MetaData()
users = Table("users", metadata, Column("id", Integer, primary_key=True))
orders = Table(
    "orders", metadata, Column("id", Integer, primary_key=True), Column("task_id", String(64))
)
waiting = outbox_table(metadata)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Sync:
    """A session of either kind, with the same words."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def run(self, work: Callable[[Session], Any]) -> Any:
        return work(self.session)


class Async(Sync):
    def __init__(self, session: AsyncSession) -> None:
        self.session: Any = session

    async def run(self, work: Callable[[Session], Any]) -> Any:
        return await self.session.run_sync(work)


class Room:
    """An app, its broker and a database."""

    def __init__(self, app: Celery, database: Database, kind: str) -> None:
        self.app, self.database, self._kind = app, database, kind
        self._redis = Redis.from_url(redis_url(app.conf.broker_url))

        @app.task(name="greet", shared=False)
        def greet(user_id: int) -> None: ...

        self.greet = greet

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Sync]:
        if self._kind == "sync":
            with Session(self.database.engine) as session:
                yield Sync(session)
        else:
            async with AsyncSession(self.database.async_engine) as session:
                yield Async(session)

    def sent(self) -> list[str]:
        """The ids of the messages in the queue, the first sent first."""
        found: Any = self._redis.lrange("celery", 0, -1)
        return [json.loads(each)["headers"]["id"] for each in reversed(found)]

    async def settled(self) -> list[str]:
        """All that was sent, once nothing is left to be: a busy machine takes its time."""
        await asyncio.to_thread(eventually, lambda: not self.left())
        return sorted(self.sent())

    def left(self) -> list[str]:
        with self.database.session() as session:
            return list(session.scalars(select(waiting.c.task_id).order_by(waiting.c.id)))

    def rows(self) -> int:
        with self.database.session() as session:
            return len(session.scalars(select(users.c.id)).all())

    async def aclose(self) -> None:
        bridge.close()  # the loop of those who are on none
        await self.database.adispose()
        self._redis.close()
        close_results(self.app.backend)


def add(session: Session) -> None:
    session.execute(users.insert().values())


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["direct", "outbox"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def room(kind: str, way: str, valkey: Valkey, database_url: str) -> AsyncIterator[Room]:
    empty_redis(valkey.celery_url)
    async with new_room(kind, way, valkey.celery_url, valkey.celery_url, database_url) as made:
        yield made


@asynccontextmanager
async def new_room(
    kind: str, way: str, broker: str, backend: str, database_url: str
) -> AsyncIterator[Room]:
    app = adopt(Celery("commit", broker=broker, backend=backend, set_as_current=False))
    app.conf.broker_pool_limit = 0
    database = Database(database_url)
    metadata.create_all(database.engine)
    if way == "outbox":
        use_outbox(app, database)
    room = Room(app, database, kind)
    try:
        yield room
    finally:
        await room.aclose()


async def test_what_is_committed_is_sent(room: Room) -> None:
    async with room.open() as opened:
        await opened.run(add)
        first = room.greet.delay_on_commit(opened.session, 1)
        second = room.greet.apply_async_on_commit(opened.session, [2], task_id="its own")
        assert room.sent() == []
        await opened.run(Session.commit)
        assert await room.settled() == sorted([first.id, second.id])
        assert second.id == "its own"
        await opened.run(add)
        await opened.run(Session.commit)
    assert await room.settled() == sorted([first.id, second.id])


async def test_of_a_transaction_that_did_nothing_else_too(room: Room) -> None:
    async with room.open() as opened:
        sent = room.greet.delay_on_commit(opened.session, 1)
        await opened.run(Session.commit)
    assert await room.settled() == [sent.id]


async def test_what_is_rolled_back_is_not(room: Room) -> None:
    async with room.open() as opened:
        room.greet.delay_on_commit(opened.session, 1)
        await opened.run(Session.rollback)
        await opened.run(add)
        await opened.run(Session.commit)
        room.greet.delay_on_commit(opened.session, 2)
        await opened.run(add)
        await opened.run(Session.flush)
        await opened.run(Session.rollback)
        room.greet.delay_on_commit(opened.session, 3)
    assert (room.sent(), room.left()) == ([], [])


async def test_a_savepoint_takes_only_its_own(room: Room) -> None:
    sent: list[str] = []

    def work(session: Session) -> None:
        sent.append(room.greet.delay_on_commit(session, 1).id)
        with session.begin_nested():
            sent.append(room.greet.delay_on_commit(session, 2).id)
            with session.begin_nested() as inner:
                room.greet.delay_on_commit(session, 3)
                inner.rollback()
            with session.begin_nested():
                sent.append(room.greet.delay_on_commit(session, 4).id)
        with session.begin_nested() as outer:
            with session.begin_nested():
                room.greet.delay_on_commit(session, 5)
            outer.rollback()
        sent.append(room.greet.delay_on_commit(session, 6).id)
        session.begin_nested()
        sent.append(room.greet.delay_on_commit(session, 7).id)
        session.commit()

    async with room.open() as opened:
        await opened.run(work)
    assert await room.settled() == sorted(sent)


async def test_what_was_asked_for_before_a_savepoint_outlives_it(room: Room) -> None:
    def work(session: Session) -> str:
        early: str = room.greet.delay_on_commit(session, 1).id
        savepoint = session.begin_nested()
        add(session)
        with pytest.raises(ZeroDivisionError), savepoint:
            raise ZeroDivisionError
        session.commit()
        return early

    async with room.open() as opened:
        early = await opened.run(work)
    assert await room.settled() == [early]


@pytest.mark.parametrize("way", ["outbox"], indirect=True)
async def test_a_row_shares_the_fate_of_its_savepoint(room: Room) -> None:
    """Rows are inserted when the first savepoint commits; that one may be rolled back yet."""

    def work(session: Session) -> str:
        early: str = room.greet.delay_on_commit(session, 1).id
        with session.begin_nested() as outer:
            with session.begin_nested():
                room.greet.delay_on_commit(session, 2)
            outer.rollback()
        session.commit()
        return early

    async with room.open() as opened:
        early = await opened.run(work)
    assert await room.settled() == [early]


async def test_bad_input_fails_at_the_call(room: Room) -> None:
    async with room.open() as opened:
        session = opened.session
        with pytest.raises(TypeError, match="user_id"):
            room.greet.delay_on_commit(session)
        with pytest.raises(TypeError, match="not JSON serializable"):
            room.greet.delay_on_commit(session, object())
        with pytest.raises(TypeError, match="expected a session of SQLAlchemy, got 1"):
            room.greet.delay_on_commit(1, 1)
        await opened.run(add)
        await opened.run(Session.commit)
    assert room.sent() == []
    with (
        Session(room.database.engine, twophase=True) as session,
        pytest.raises(ConfigurationError, match="two-phase"),
    ):
        room.greet.delay_on_commit(session, 1)


@pytest.mark.parametrize("way", ["direct"], indirect=True)
async def test_an_ordering_key_takes_an_outbox(room: Room) -> None:
    async with room.open() as opened:
        with pytest.raises(ConfigurationError, match="use_outbox"):
            room.greet.apply_async_on_commit(opened.session, [1], ordering_key="a")


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("count", [1, 3])
async def test_without_an_outbox_an_absent_broker_is_told_and_the_commit_stands(
    kind: str, count: int, valkey: Valkey, database_url: str
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    async with (
        new_room(kind, "direct", nowhere, valkey.celery_url, database_url) as room,
        room.open() as opened,
    ):
        await opened.run(add)
        sent = [room.greet.delay_on_commit(opened.session, n).id for n in range(count)]
        with pytest.raises(PublishError) as raised:
            await opened.run(Session.commit)
        assert room.rows() == 1
        await opened.run(add)
        await opened.run(Session.commit)
        assert room.rows() == 2
    if isinstance(raised.value, PublishManyError):
        assert sorted(each.task_id for each in raised.value.outcomes) == sorted(sent)
    else:
        assert raised.value.task_id == sent[0]
        assert sent[0] in str(raised.value)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_with_an_outbox_what_an_absent_broker_missed_follows(
    kind: str, valkey: Valkey, database_url: str, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as server, Proxy(server.port) as network:
        broker = server.url_at(network.port)
        async with new_room(kind, "outbox", broker, valkey.celery_url, database_url) as room:
            network.refuse()
            sent, slowest = [], 0.0
            for n in range(20):
                async with room.open() as opened:
                    sent.append(room.greet.delay_on_commit(opened.session, n).id)
                    began = time.monotonic()
                    await opened.run(Session.commit)
                    slowest = max(slowest, time.monotonic() - began)
            assert slowest < 1
            assert sorted(room.left()) == sorted(sent)
            async with Reader(room.app) as reader:
                assert (await reader.snapshot(sent[0])).state == states.PENDING
            network.heal()
            await asyncio.to_thread(eventually, lambda: not room.left())
            assert sorted(room.sent()) == sorted(sent)


@pytest.mark.parametrize("way", ["outbox"], indirect=True)
async def test_those_of_one_key_are_sent_in_their_order(room: Room) -> None:
    sent: dict[str, list[str]] = {"a": [], "b": []}
    for n in range(12):
        key = "ab"[n % 2]
        async with room.open() as opened:
            made = room.greet.apply_async_on_commit(opened.session, [n], ordering_key=key)
            sent[key].append(made.id)
            await opened.run(Session.commit)
    await asyncio.to_thread(eventually, lambda: not room.left())
    order = room.sent()
    assert len(order) == 12
    for ids in sent.values():
        assert [each for each in order if each in ids] == ids


@pytest.mark.parametrize("way", ["outbox"], indirect=True)
async def test_known_only_when_committed(room: Room) -> None:
    async with Reader(room.app) as reader, room.open() as opened:
        made = room.greet.delay_on_commit(opened.session, 1)
        with pytest.raises(UnknownTaskError):
            await reader.snapshot(made.id)
        await opened.run(Session.commit)
        assert (await reader.snapshot(made.id)).state == states.PENDING


class Outer:
    """A worker, a database, and processes that publish on commit."""

    def __init__(self, worker: Worker, database_url: str, env: dict[str, str]) -> None:
        self.worker, self.env = worker, env
        self.database = Database(database_url)
        self.values = worker.notes

    def commit(self, *arguments: str) -> list[str]:
        """What another process published, or was about to when it was killed."""
        env = clean_environment(**self.env)
        done = run_python("outbox_app.py", *arguments, cwd=APPS, env=env, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    @contextmanager
    def relay(self) -> Iterator[Process]:
        env = clean_environment(**self.env)
        command = "-m", "celeriac.cli", "relay", "-A", "outbox_app.celery"
        with python(*command, cwd=APPS, env=env) as process:
            process.wait_for("relay: sends what is left")
            yield process

    @contextmanager
    def web(self) -> Iterator[str]:
        port = free_port()
        env = clean_environment(**self.env)
        command = "-m", "uvicorn", "outbox_app:web", "--port", str(port), "--log-level", "warning"
        with python(*command, cwd=APPS, env=env):
            eventually(lambda: not is_free(port))
            yield f"http://127.0.0.1:{port}"

    def orders(self) -> list[str]:
        with self.database.session() as session:
            return list(session.scalars(select(orders.c.task_id)))

    def all_shipped(self) -> bool:
        """Whether there is one run for each order, and nothing else."""
        assert self.values.llen("missing") == 0
        ordered, ran = self.orders(), self.runs()
        assert set(ran) <= set(ordered)
        assert len(set(ran)) == len(ran)
        return len(ran) == len(ordered) and not self.left()

    def runs(self) -> list[str]:
        found: Any = self.values.lrange("runs", 0, -1)
        return [each.decode() for each in found]

    def left(self) -> int:
        with self.database.session() as session:
            return len(session.scalars(select(waiting.c.id)).all())


@contextmanager
def outer(redis: str, database_url: str, *, broker: str = "", **env: str) -> Iterator[Outer]:
    broker = broker or redis
    database = Database(database_url)
    metadata.create_all(database.engine)
    env = {"BROKER": broker, "BACKEND": redis, "DATABASE_URL": database_url} | env
    with Worker("outbox_app", "celeriac", broker, redis, DATABASE_URL=database_url) as worker:
        made = Outer(worker, database_url, env | {"QUEUE": worker.queue})
        yield made
        made.database.dispose()
    database.dispose()


@pytest.fixture(params=BROKERS)
def servers(request: pytest.FixtureRequest, valkey: Valkey) -> tuple[str, str]:
    """The result backend, and the broker."""
    backend = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(backend)
    return backend, given("TEST_AMQP_URL") if request.param == "rabbitmq" else backend


def test_what_killed_processes_left_is_sent_by_a_relay_and_runs_once(
    servers: tuple[str, str], database_url: str
) -> None:
    redis, broker = servers
    with outer(redis, database_url, broker=broker) as room, room.relay() as relay:
        published = [*room.commit("100", "die"), *room.commit("2")]
        eventually(lambda: len(room.runs()) >= 102 and not room.left(), timeout=30)
        assert sorted(room.runs()) == sorted(published)
        relay.signal(signal.SIGTERM)
        assert relay.wait() == 0


def test_a_program_that_ends_leaves_no_row(valkey: Valkey, database_url: str) -> None:
    empty_redis(valkey.celery_url)
    with outer(valkey.celery_url, database_url) as room:
        published = room.commit("3")
        assert room.left() == 0
        eventually(lambda: sorted(room.runs()) == sorted(published))


def test_relays_share_what_is_left_to_them(redis_server: str, database_url: str) -> None:
    with outer(redis_server, database_url, RELAYED="1") as room, room.relay(), room.relay():
        published = room.commit("200")
        eventually(lambda: len(room.runs()) >= 200 and not room.left())
        assert sorted(room.runs()) == sorted(published)


@pytest.mark.parametrize(
    "work",
    [
        lambda add, total: chain(add.s(1, 2), add.s(3), add.s(4)),
        lambda add, total: group(add.s(1, 2), add.s(3, 4)),
        lambda add, total: chord([add.s(1, 2), add.s(3, 4)], total.s()),
        lambda add, total: chain(add.s(1, 2), group(add.s(3), add.s(4)), total.s()),
        lambda add, total: group(chain(add.s(1, 2), add.s(3)), add.s(4, 5)),
    ],
    ids=["chain", "group", "chord", "chain-of-group", "group-of-chain"],
)
def test_a_canvas_that_is_sent_twice_runs_once_under_its_ids(
    work: Any, valkey: Valkey, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'test.sqlite3'}"
    empty_redis(valkey.celery_url)
    with outer(valkey.celery_url, url) as room:
        app = Celery("canvas", broker=valkey.celery_url, backend=valkey.celery_url)
        adopt(app).conf.broker_pool_limit = 0
        use_outbox(app, room.database, relayed=True)
        options = {"options": {"queue": room.worker.queue}}
        add, total = (app.signature(f"outbox_app.{n}", **options) for n in ("add", "total"))
        canvas = work(SimpleNamespace(s=lambda *a: add.clone(a)), SimpleNamespace(s=total.clone))
        with room.database.session() as session:
            made = delay_on_commit(canvas, session)
            session.commit()
            row = dict(session.execute(select(waiting)).mappings().one())
            del row["id"]
        with room.relay():
            value = made.get(timeout=20)
            before = len(room.runs())
            with room.database.session() as session:
                session.execute(waiting.insert().values(row))
                session.commit()
            eventually(lambda: not room.left())
            marker = app.signature("outbox_app.add", (0, 0), **options).apply_async()
            assert marker.get(timeout=20) == 0
        assert len(room.runs()) == before + 1
        assert made.get(timeout=5) == value
        close_results(app.backend)


@pytest.mark.parametrize("way", ["outbox"], indirect=True)
async def test_no_row_gets_the_number_of_one_that_was_removed(room: Room) -> None:
    """Whoever is late to remove it would remove the other."""
    numbers: list[int] = []
    for n in range(2):
        row = {"task_id": str(n), "signature": "", "claimed_until": time.time() + 60}
        with room.database.session() as session:
            numbers += session.scalars(waiting.insert().values(row).returning(waiting.c.id))
            session.execute(waiting.delete())
            session.commit()
    assert numbers[0] < numbers[1]


@pytest.mark.parametrize("path", ["/orders", "/sync-orders"])
async def test_the_row_is_always_found(
    path: str, servers: tuple[str, str], database_url: str
) -> None:
    redis, broker = servers
    with outer(redis, database_url, broker=broker) as room, room.web() as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for _ in range(100):
                answers = await asyncio.gather(*(client.post(path) for _ in range(20)))
                assert {each.status_code for each in answers} == {200}
        await asyncio.to_thread(eventually, room.all_shipped, 30)
        assert len(room.orders()) == 2000


@pytest.mark.parametrize("path", ["/orders", "/sync-orders"])
async def test_exactly_what_was_committed_is_sent(
    path: str, redis_server: str, database_url: str
) -> None:
    fresh = httpx.Limits(max_keepalive_connections=0)  # uvicorn closes one that had an error
    with outer(redis_server, database_url) as room, room.web() as url:
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=fresh) as client:
            for then in ["", "savepoint", "rollback", "raise"] * 5:
                await client.post(path, params={"then": then})
            for _ in range(5):
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(path, params={"then": "wait"}, timeout=0.1)
        # Whoever has gone away does not take back what is committed then.
        await asyncio.to_thread(eventually, lambda: len(room.orders()) == 15)
        await asyncio.to_thread(eventually, room.all_shipped)


@pytest.mark.parametrize("path", ["/orders", "/sync-orders"])
async def test_no_request_fails_while_the_broker_is_away(
    path: str, valkey: Valkey, database_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(tmp_path / "redis"))
        network = stack.enter_context(Proxy(server.port))
        broker = server.url_at(network.port)
        room = stack.enter_context(outer(server.url, database_url, BROKER=broker))
        with room.relay(), room.web() as url:
            took: dict[bool, list[float]] = {True: [], False: []}  # by whether it was away

            async def keep_ordering(client: httpx.AsyncClient, until: float) -> None:
                while (began := time.monotonic()) < until:
                    assert (await client.post(path)).status_code == 200
                    took[began > away[0]].append(time.monotonic() - began)
                    # Without a break SQLite's writers, who sleep while they wait, starve others.
                    await asyncio.sleep(0.05)

            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                away = time.monotonic() + 1, time.monotonic() + 1 + OUTAGE
                ordering = [
                    asyncio.create_task(keep_ordering(client, away[1] + 1)) for _ in range(5)
                ]
                await asyncio.sleep(away[0] - time.monotonic())  # some that are sent at once
                network.refuse()
                await asyncio.sleep(away[1] - time.monotonic())
                assert room.left() > 0
                network.heal()
                await asyncio.gather(*ordering)
            await asyncio.to_thread(eventually, room.all_shipped, 60)
            assert max(took[True]) < 1 + max(took[False])  # which is what this machine takes


async def test_typed_arguments_are_refused_or_written_at_the_call(room: Room) -> None:
    @room.app.task(name="remind", pydantic=True, shared=False)
    def remind(when: datetime.datetime, of: list[uuid.UUID]) -> None: ...

    task: Any = remind
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    async with room.open() as opened:
        with pytest.raises(ArgumentError, match="when"):
            task.delay_on_commit(opened.session, "never", of=[])
        sent = task.delay_on_commit(opened.session, moment, of=[uuid.UUID(int=1)])
        await opened.run(Session.commit)
    assert await room.settled() == [sent.id]


@pytest.mark.parametrize("kind", ["sync"], indirect=True)
async def test_sessions_that_others_made(room: Room) -> None:
    """A scoped one, as Flask-SQLAlchemy's, and one that a sessionmaker begins and commits."""
    maker = sessionmaker(room.database.engine)
    scoped = scoped_session(maker)
    scoped.execute(users.insert().values())
    sent = [room.greet.delay_on_commit(scoped, 1).id]
    scoped.commit()
    scoped.remove()
    with maker.begin() as session:
        sent.append(room.greet.delay_on_commit(session, 2).id)

    def fail() -> None:
        with maker.begin() as session:
            room.greet.delay_on_commit(session, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    async_maker = async_sessionmaker(room.database.async_engine)
    async with async_maker.begin() as async_session:
        sent.append(room.greet.delay_on_commit(async_session, 4).id)
    async_scoped = async_scoped_session(async_maker, scopefunc=asyncio.current_task)
    sent.append(room.greet.delay_on_commit(async_scoped, 5).id)
    await async_scoped.commit()
    await async_scoped.remove()
    assert await room.settled() == sorted(sent)
