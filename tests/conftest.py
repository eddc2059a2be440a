"""Services and leaks. Tests use only servers that they start, or that TEST_…_URL gives them."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from celeriac.embedded import Valkey
from support import clean_environment, empty_redis, fresh_postgres_database, given, wanted

for name in set(os.environ) - set(clean_environment()):
    del os.environ[name]


def _own_services(number: int) -> None:
    """The Redis database and the virtual host of the `number`th of the processes side by side."""
    if url := os.environ.get("TEST_REDIS_URL"):
        address, _, database = url.rpartition("/")
        os.environ["TEST_REDIS_URL"] = f"{address}/{int(database) - number}"
    if url := os.environ.get("TEST_AMQP_URL"):
        os.environ["TEST_AMQP_URL"] = f"{url}-{number}"


if number := int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")):
    _own_services(number)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """An embedded server for all tests that do not restart it."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(params=["embedded", *wanted("redis", "TEST_REDIS_URL")])
def redis_server(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    """The URL, as Celery writes it, of an empty Redis."""
    url = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(url)
    return url


@pytest.fixture(params=["sqlite", *wanted("postgresql", "TEST_DATABASE_URL")])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.sqlite3'}"
    else:
        with fresh_postgres_database(given("TEST_DATABASE_URL")) as url:
            yield url


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [each for each in threading.enumerate() if each not in before and not each.daemon]
    for thread in left:  # of which some are about to end
        thread.join(1)
    left = [thread for thread in left if thread.is_alive()]
    assert left == []


@pytest.fixture(autouse=True)
def _leaves_no_loop() -> Iterator[None]:
    yield
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    pytest.fail("an event loop is still running")
