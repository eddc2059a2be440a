"""`./run dev`, on each set of services that this machine has, and a browser."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kombu.connection import Connection
from playwright.sync_api import Browser

from browser import chromium
from support import clean_environment, empty_redis, fresh_postgres_database, given, wanted
from system import System, free_base_port

SERVICES = wanted("redis + postgresql", "TEST_REDIS_URL") + wanted(
    "rabbitmq + redis + postgresql", "TEST_AMQP_URL"
)


def _services(kind: str, stack: ExitStack) -> dict[str, str]:
    if kind == "embedded":
        return {}
    redis, database = given("TEST_REDIS_URL"), given("TEST_DATABASE_URL")
    broker = redis
    empty_redis(redis)
    if kind.startswith("rabbitmq"):
        broker = given("TEST_AMQP_URL")
        connect = Connection(broker)  # type: ignore[no-untyped-call]
        with connect as connection, connection.channel() as channel:
            for queue in ("default", "high_priority", "low_priority"):
                channel.queue_delete(queue)
    return {
        "CELERY_BROKER_URL": broker,
        "CELERY_RESULT_BACKEND": redis,
        "DATABASE_URL": stack.enter_context(fresh_postgres_database(database)),
    }


@pytest.fixture(scope="module", params=["embedded", *SERVICES])
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """`./run dev`, on each set of services; one for all tests of a file that do not stop it.

    Not for those of other files: it would take dead letters out of theirs.
    """
    with ExitStack() as stack:
        env = clean_environment(**_services(request.param, stack))
        running = System(tmp_path_factory.mktemp("data"), free_base_port(), env)
        stack.callback(running.close)
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(autouse=True)
def _third_party_is_quick(request: pytest.FixtureRequest) -> None:
    if "system" in request.fixturenames:
        request.getfixturevalue("system").behave()
