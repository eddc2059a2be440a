"""What every worker process opens before its first task and closes after its last."""

import signal

import pytest

from celeriac.embedded import Valkey
from support import empty_redis
from workers import POOLS, Worker


@pytest.fixture(params=list(POOLS))
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_each_worker_process_enters_it_before_its_first_task_and_leaves_it_after_its_last(
    pool: str, valkey: Valkey
) -> None:
    empty_redis(valkey.celery_url)
    with Worker("pool_app", pool, valkey.celery_url, valkey.celery_url, LIFESPAN="1") as worker:
        processes = 2 if pool == "prefork" else 1
        entered = dict(worker.noted("lifespan").split()[1:] for _ in range(processes))
        for _ in range(10):
            process, loop = worker.send("loop_of_this_process").get(timeout=10)
            assert entered[str(process)] == str(loop)
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert {worker.noted("lifespan") for _ in entered} == {f"left {pid}" for pid in entered}


def test_a_lifespan_that_fails_ends_the_worker_with_its_reason(pool: str, valkey: Valkey) -> None:
    worker = Worker(
        "pool_app", pool, valkey.celery_url, valkey.celery_url,
        LIFESPAN="1", FAIL_AT_START="no database here",
    )  # fmt: skip
    try:
        assert worker.process.wait(timeout=30) not in (0, -signal.SIGKILL)
        worker.process.wait_for(r"CRITICAL.*lifespan failed: RuntimeError\('no database here'\)")
        assert " ready." not in worker.process.output or pool == "prefork"
    finally:
        worker.close()


def test_a_cold_shutdown_leaves_it_too(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", "celeriac", *urls, LIFESPAN="1") as worker:
        process = worker.noted("lifespan").split()[1]
        worker.process.signal(signal.SIGQUIT)
        worker.process.wait()
        assert worker.noted("lifespan") == f"left {process}"
