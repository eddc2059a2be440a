"""Servers that scenarios may kill, and where the ledger is."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celeriac import threads
from chaos.ledger import DatabaseLedger
from chaos.servers import RabbitServer, RedisServer, Server
from chaos.stage import BROKERS, Stage
from support import fresh_postgres_database, given, missing, wanted


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where every run of every task is written down."""
    if not wanted("postgresql", "TEST_DATABASE_URL"):
        yield str(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
        return
    with fresh_postgres_database(given("TEST_DATABASE_URL")) as url:
        made = DatabaseLedger(url, "")
        made.create()
        made.close()
        yield url


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(_redis: RedisServer) -> Iterator[RedisServer]:
    """Empty, and running again afterwards."""
    with _redis.client() as client:
        client.flushall()
    yield _redis
    _redis.recover()


@pytest.fixture(scope="session")
def _rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    if RabbitServer.program() is None:
        missing("RabbitMQ's server program")
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def rabbitmq(_rabbitmq: RabbitServer) -> Iterator[RabbitServer]:
    yield _rabbitmq
    _rabbitmq.recover()


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def stage(broker: Server, redis: RedisServer, ledger: str) -> Iterator[Callable[..., Stage]]:
    """Makes one on the broker, with results in Redis; keywords are the stage's."""
    made: list[Stage] = []

    def make(broker_url: str = broker.url, backend_url: str = redis.url, **options: Any) -> Stage:
        options.setdefault("store", redis.url)
        made.append(Stage(broker_url, backend_url, ledger, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_idle_thread() -> Iterator[None]:
    yield
    threads.close()
