"""Publishing to brokers that are away, silent, paused or full, and calls that are given up."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from celery import Celery, chain, group
from redis import Redis
from redis.asyncio.connection import AbstractConnection

from celeriac import PublishError, adelay, adopt
from celeriac.embedded import Valkey
from celeriac.pipeline import Pipeline
from celeriac.publish import aapply_async
from celeriac.store import redis_url, status_connection
from publishing import make_app, took_task_ids, turns
from support import free_port

SLACK = 0.5  # seconds after a deadline in which a loaded machine still answers
PAUSE = 0.002  # seconds
TURNS = 20  # of the loop, at least, while a call waits for hundreds of pauses


class Silent:
    """A port that accepts and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def fails_within(timeout: float, *, at_once: bool = False) -> AsyncIterator[None]:
    began = time.perf_counter()
    with turns(PAUSE) as taken, pytest.raises(PublishError):
        yield
    assert time.perf_counter() - began < timeout + SLACK
    assert at_once or taken.count > TURNS


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_refused_connection_is_a_publish_error_at_once(scheme: str) -> None:
    app = make_app(f"{scheme}://127.0.0.1:{free_port()}/0")

    async def publish() -> None:
        async with fails_within(0.5, at_once=True):
            await app.tasks["add"].adelay(1)
        async with fails_within(0.5, at_once=True):
            await adelay(group(app.tasks["add"].s(1), app.tasks["add"].s(2)))
        async with fails_within(0.5, at_once=True):
            await adelay(chain(app.tasks["add"].s(1), app.tasks["add"].s(2)))

    asyncio.run(publish())


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_black_hole_is_a_publish_error_at_the_deadline(scheme: str) -> None:
    hole = Silent()
    app = make_app(f"{scheme}://127.0.0.1:{hole.port}/0")
    adopt(app, publish_timeout=0.4)
    add = app.tasks["add"]

    async def publish() -> None:
        async with fails_within(0.4):
            await add.adelay(1)
        async with fails_within(0.2):
            await add.aapply_async((1,), publish_timeout=0.2, task_id="mine")
        began = time.perf_counter()
        with turns(PAUSE) as taken:
            done = await asyncio.gather(
                *(add.adelay(number) for number in range(200)), return_exceptions=True
            )
        assert time.perf_counter() - began < 0.4 + SLACK
        assert {type(each) for each in done} == {PublishError}
        assert not any(each.maybe_accepted for each in done if isinstance(each, PublishError))
        assert taken.count > TURNS
        steps = chain(add.s(1), add.s(2))
        lost = (aapply_async(steps, publish_timeout=0.2) for _ in range(20))
        done = await asyncio.gather(*lost, return_exceptions=True)
        assert {type(each) for each in done} == {PublishError}
        # Its threads are free again soon.
        elsewhere = make_app("memory://")
        await aapply_async(elsewhere.tasks["add"].s(1), publish_timeout=1.0)

    try:
        asyncio.run(publish())
    finally:
        hole.close()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path) as server:
        yield server


def pid_of(server: Valkey) -> int:
    with Redis.from_url(redis_url(server.celery_url)) as client:
        return int(client.info("server")["process_id"])


def test_a_paused_broker_is_a_publish_error_and_the_next_call_after_it_works(
    own_valkey: Valkey,
) -> None:
    app = make_app(own_valkey.celery_url)
    add, pid = app.tasks["add"], pid_of(own_valkey)

    async def publish() -> tuple[str, str]:
        first = await add.adelay(1)
        os.kill(pid, signal.SIGSTOP)
        try:
            async with fails_within(0.3):
                await add.aapply_async((2,), publish_timeout=0.3)
            with pytest.raises(PublishError, match="task never was not sent") as unsent:
                await add.aapply_async((3,), publish_timeout=0.2, task_id="never")
            assert not unsent.value.maybe_accepted
        finally:
            os.kill(pid, signal.SIGCONT)
        last = await add.adelay(4)
        await asyncio.sleep(0.2)
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count("celeriac-redis") == 1  # the paused connection has gone
        return first.id, last.id

    first, last = asyncio.run(publish())
    ids = took_task_ids(app)
    assert ids[0] == first
    assert last in ids
    assert "never" not in ids


def test_a_call_that_fails_does_not_fail_those_that_have_time(own_valkey: Valkey) -> None:
    app = make_app(own_valkey.celery_url)
    add, pid = app.tasks["add"], pid_of(own_valkey)

    async def publish() -> None:
        await add.adelay(0)
        os.kill(pid, signal.SIGSTOP)
        patient = asyncio.create_task(add.aapply_async((1,), task_id="patient", publish_timeout=10))
        await asyncio.sleep(0.05)
        with pytest.raises(PublishError):
            await add.aapply_async((2,), publish_timeout=0.1)
        os.kill(pid, signal.SIGCONT)
        assert (await patient).id == "patient"

    asyncio.run(publish())


def test_a_full_broker_is_a_publish_error(own_valkey: Valkey) -> None:
    app = make_app(own_valkey.celery_url)
    add = app.tasks["add"]

    async def publish() -> None:
        with Redis.from_url(redis_url(own_valkey.celery_url)) as client:
            await add.adelay(1)
            client.config_set("maxmemory", 1)
            with pytest.raises(PublishError, match="maxmemory") as full:
                await add.adelay(2)
            assert not full.value.maybe_accepted
            client.config_set("maxmemory", 0)
        await add.adelay(3)

    asyncio.run(publish())
    assert len(took_task_ids(app)) == 2


def test_a_restarted_broker_does_not_fail_the_next_call(own_valkey: Valkey) -> None:
    app = make_app(own_valkey.celery_url)

    async def publish() -> None:
        await app.tasks["add"].adelay(1)
        await asyncio.to_thread(own_valkey.stop)
        await asyncio.to_thread(own_valkey.start)
        await app.tasks["add"].adelay(2)

    asyncio.run(publish())


def test_ten_thousand_failed_calls_leave_nothing_behind() -> None:
    hole = Silent()
    process = psutil.Process()

    async def fail(app: Celery, calls: int) -> None:
        await asyncio.gather(
            *(app.tasks["add"].aapply_async((n,), publish_timeout=0.5) for n in range(calls)),
            return_exceptions=True,
        )

    async def publish() -> None:
        for url in (
            f"redis://127.0.0.1:{hole.port}/0",
            f"amqp://127.0.0.1:{hole.port}/0",
            f"redis://127.0.0.1:{free_port()}/0",
        ):
            app = make_app(url)
            await fail(app, 10)
            await asyncio.sleep(0.1)
            before, tasks = process.num_fds(), len(asyncio.all_tasks())
            for _ in range(10):
                await fail(app, 334)
            await asyncio.sleep(1.0)
            assert process.num_fds() <= before + 1
            assert len(asyncio.all_tasks()) <= tasks + 1

    try:
        asyncio.run(publish())
    finally:
        hole.close()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("celeriac-publish") <= 4


def test_a_cancelled_call_sends_nothing_later(own_valkey: Valkey) -> None:
    app = make_app(own_valkey.celery_url)
    add, pid = app.tasks["add"], pid_of(own_valkey)

    async def publish() -> None:
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.create_task(add.adelay(1))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        os.kill(pid, signal.SIGCONT)
        await add.aapply_async((2,), task_id="second")

    asyncio.run(publish())
    assert took_task_ids(app) == ["second"]


def test_a_command_whose_caller_has_gone_is_not_written(redis_app: Celery, valkey: Valkey) -> None:
    app = make_app("memory://", valkey.celery_url)

    async def send() -> int:
        def connection() -> AbstractConnection:
            made = status_connection(app)
            assert made is not None
            return made

        pipeline = Pipeline(connection, lambda: None)
        soon = asyncio.get_running_loop().time() + 5
        gone = pipeline.send(("LPUSH", "gone", "1"), deadline=soon)
        kept = pipeline.send(("LPUSH", "kept", "1"), deadline=soon)
        gone.cancel()
        assert await kept == 1
        found: int = await pipeline.send(("EXISTS", "gone"), deadline=soon)
        await pipeline.aclose()
        return found

    assert asyncio.run(send()) == 0
