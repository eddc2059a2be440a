"""What several integration tests start from."""

from collections.abc import Iterator

import pytest
from celery import Celery

from celeriac import threads
from celeriac.embedded import Valkey
from publishing import make_app
from support import empty_redis


@pytest.fixture
def redis_app(valkey: Valkey) -> Celery:
    empty_redis(valkey.celery_url)
    return make_app(valkey.celery_url)


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_idle_thread() -> Iterator[None]:
    yield
    threads.close()
