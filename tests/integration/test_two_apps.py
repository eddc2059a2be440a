"""Two applications with two configurations in one process keep apart."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery, shared_task
from celery.result import AsyncResult

import celeriac
from celeriac import use_app
from celeriac.embedded import Valkey
from publishing import make_app, take
from support import empty_redis


@celeriac.shared_task
def shared(number: int) -> int:
    return number


@shared_task
async def shared_and_async(number: int) -> int:
    await asyncio.sleep(0)
    return number


@pytest.fixture
def apps(valkey: Valkey) -> Iterator[list[Celery]]:
    urls = [valkey.celery_url.replace("virtual_host=0", f"virtual_host={n}") for n in (1, 2)]
    for url in urls:
        empty_redis(url)
    apps = [make_app(url, url) for url in urls]
    yield apps
    for app in apps:
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()


def numbers(app: Celery) -> list[int]:
    found = []
    while (message := take(app)) is not None:
        found.append(message.payload[0][0])
    return sorted(found)


def test_shared_tasks_called_from_threads_reach_the_chosen_app_only(apps: list[Celery]) -> None:
    both = threading.Barrier(2)

    def send(app: Celery, base: int) -> None:
        with use_app(app):
            for n in range(10):
                both.wait(10)  # the two call at the same time
                shared.delay(base + n)
                shared_and_async.delay(base + n)

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(send, app, 100 * n) for n, app in enumerate(apps)]:
            future.result(30)
    for n, app in enumerate(apps):
        assert numbers(app) == sorted(2 * list(range(100 * n, 100 * n + 10)))


def test_shared_tasks_published_at_the_same_time_from_one_loop_keep_apart(
    apps: list[Celery],
) -> None:
    async def send(app: Celery, base: int) -> None:
        with use_app(app):
            for n in range(10):
                await shared.adelay(base + n)
                await celeriac.adelay(shared_and_async, base + n)
            # A thread that is started here has this choice too.
            await asyncio.to_thread(shared.delay, base + 50)

    async def main() -> None:
        await asyncio.gather(*(send(app, 100 * n) for n, app in enumerate(apps)))

    asyncio.run(main())
    for n, app in enumerate(apps):
        assert numbers(app) == sorted([*2 * list(range(100 * n, 100 * n + 10)), 100 * n + 50])


def test_results_are_those_of_the_chosen_app(apps: list[Celery]) -> None:
    first, second = apps
    first.backend.store_result("task", 1, "SUCCESS")
    for app, state in ((first, "SUCCESS"), (second, "PENDING")):
        with use_app(app):
            assert AsyncResult("task").state == state
