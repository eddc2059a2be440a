"""What workers tell of their tasks, in every pool, to whoever follows them."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import TaskRevokedError

from celeriac import adelay, adopt, records
from celeriac.app import watching_runs
from celeriac.embedded import Valkey
from celeriac.errors import PublicError
from celeriac.handle import as_completed, handle
from celeriac.status import Event, Reader, Status
from support import close_results, empty_redis, given
from workers import BROKERS, POOLS, Worker

pytestmark = pytest.mark.anyio

LEASE = 2.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    empty_redis(valkey.celery_url)
    if request.param == "redis":
        empty_redis(given("TEST_REDIS_URL"))
    urls = {"rabbitmq": "TEST_AMQP_URL", "redis": "TEST_REDIS_URL"}
    return given(urls[request.param]) if request.param in urls else valkey.celery_url


class Side:
    """A worker, and the web side that sends to it."""

    def __init__(self, worker: Worker, app: Celery, reader: Reader) -> None:
        self.worker, self.app, self.reader = worker, app, reader

    async def send(self, name: str, *args: object, **options: Any) -> str:
        signature = self.app.signature(f"status_app.{name}", args, **options)
        signature.set(queue=self.worker.queue)
        sent = await asyncio.to_thread(signature.apply_async)
        return str(sent.id)

    async def follow(self, task_id: str, after: int | None = None) -> list[Status | Event]:
        async with asyncio.timeout(20), self.reader.follow(task_id, after) as events:
            return [event async for event in events]


@asynccontextmanager
async def side(
    pool: str, broker: str, valkey: Valkey, *options: str, **env: str
) -> AsyncIterator[Side]:
    app = Celery("web", broker=broker, backend=valkey.celery_url, set_as_current=False)
    app.conf.broker_pool_limit = 0
    adopt(app, status_store=env.get("STATUS_STORE"))
    with Worker("status_app", pool, broker, valkey.celery_url, *options, **env) as worker:
        async with Reader(app) as reader:
            yield Side(worker, app, reader)
    close_results(app.backend)


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def states(events: list[Any]) -> list[str]:
    return [each.state for each in events if isinstance(each, Status)]


async def test_what_a_task_tells_arrives_in_order_and_before_its_end(
    pool: str, broker: str, valkey: Valkey
) -> None:
    async with side(pool, broker, valkey) as web:
        for name in ("tell", "tell_sync"):
            events = await web.follow(await web.send(name, 300), after=0)
            lines = [each.data for each in events if isinstance(each, Event)]
            assert lines == [f"line {n}" for n in range(300)]
            assert states(events) == ["STARTED", "PROGRESS", "SUCCESS"]
            progress, end = events[-2:]
            assert isinstance(progress, Status)
            assert progress.result == {"current": 300, "total": 300, "message": "all told"}
            assert isinstance(end, Status)
            assert end.result == 300
            assert [each.id for each in events] == list(range(1, 304))
        # Many at once, of which the last is sure to be seen.
        events = await web.follow(await web.send("count_up", 20_000), after=0)
        seen = [
            (each.result or {})["current"]
            for each in events
            if each.as_json().get("state") == "PROGRESS"
        ]
        assert seen == sorted(seen)
        assert seen[-1] == 20_000
        assert len(seen) < 5_000
        # One whose value nobody wants is followed all the same.
        events = await web.follow(await web.send("quiet"), after=0)
        assert states(events) == ["STARTED", "SUCCESS"]
        assert events[-1].as_json().get("result") is None


async def test_a_retry_says_when_and_a_failure_why(broker: str, valkey: Valkey) -> None:
    async with side("celeriac", broker, valkey) as web:
        events = await web.follow(await web.send("again"), after=0)
        assert states(events) == ["STARTED", "RETRY", "STARTED", "SUCCESS"]
        first, retry = events[:2]
        assert isinstance(first, Status)
        assert isinstance(retry, Status)
        assert first.time is not None
        assert retry.retry_at == pytest.approx(first.time + 1, abs=0.5)
        assert retry.code == "ValueError"
        *_, end = await web.follow(await web.send("refuse"))
        assert isinstance(end, Status)
        assert (end.code, end.error, end.safe) == ("too_large", "The file is too large.", True)


async def test_all_of_a_canvas_is_known_and_belongs_to_who_sent_it(
    broker: str, valkey: Valkey
) -> None:
    async with side("celeriac", broker, valkey) as web:
        add = web.app.signature("status_app.add", queue=web.worker.queue)
        with records.as_owner("alice"):
            follows = chord(
                [add.clone((1, 1)), add.clone((2, 2))],
                web.app.signature("celery.accumulate", queue=web.worker.queue),
            )
            last = await asyncio.to_thread(chain(add.clone((1, 2)), add.clone((3,))).apply_async)
            body = await asyncio.to_thread(follows.apply_async)
            child = await web.send("parent")
        ids = [last.id, last.parent.id, body.id, *(each.id for each in body.parent.children), child]
        for task_id in ids:
            assert (await web.follow(task_id))[-1].as_json()["state"] == "SUCCESS"
        owner, child = (await web.reader.snapshot(child)).result
        assert owner == "alice"
        end = (await web.follow(child))[-1]
        assert isinstance(end, Status)
        assert end.result == "alice"
        for task_id in (*ids, child):
            record = (await web.reader.snapshot(task_id)).record
            assert record is not None
            assert (record.owner, record.queue) == ("alice", web.worker.queue)
        for sent in (last, body):  # each thread has a backend, and Celery keeps copies in cycles
            close_results(sent.backend)


async def test_what_a_stock_producer_sent_is_known_once_a_worker_has_it(
    broker: str, valkey: Valkey
) -> None:
    async with side("celeriac", broker, valkey) as web:
        sent = web.worker.signature("wait", 0).apply_async(countdown=60)
        async with asyncio.timeout(10):
            while True:
                try:
                    status = await web.reader.snapshot(sent.id)
                except LookupError:
                    await asyncio.sleep(0.05)
                else:
                    break
        assert status.state == "PENDING"
        assert status.record is not None
        assert status.record.task == "status_app.wait"


async def test_what_is_cancelled_before_it_begins_never_begins(
    pool: str, broker: str, valkey: Valkey
) -> None:
    """Also where no worker hears of it in time: there is none yet."""
    app = Celery("web", broker=broker, backend=valkey.celery_url, set_as_current=False)
    app.conf.broker_pool_limit = 0
    adopt(app)
    signature = app.signature("status_app.wait", (0,), queue=f"later-{pool}")
    sent = await asyncio.to_thread(signature.apply_async)
    async with Reader(app) as reader:
        async with reader.follow(sent.id) as events:
            assert (await anext(events)).as_json()["state"] == "PENDING"
            assert (await reader.cancel(sent.id)).state == "REVOKED"
            assert states([each async for each in events]) == ["REVOKED"]
        async with side(pool, broker, valkey, "-Q", f"later-{pool}") as web:
            web.worker.process.wait_for(r"wait\[")
            after = await asyncio.to_thread(
                app.signature("status_app.add", (1, 2), queue=f"later-{pool}").apply_async
            )
            assert states(await web.follow(after.id))[-1] == "SUCCESS"
            assert states(await web.follow(sent.id, after=0)) == ["REVOKED"]
            assert not web.worker.notes.exists("note:started")
    close_results(app.backend)


async def test_what_runs_is_cancelled(broker: str, valkey: Valkey) -> None:
    for pool, name in (("celeriac", "wait"), ("prefork", "wait"), ("prefork", "wait_sync")):
        async with side(pool, broker, valkey) as web:
            task_id = await web.send(name, 60)
            await asyncio.to_thread(web.worker.noted, "started")
            await web.reader.cancel(task_id)
            *_, end = await web.follow(task_id)
            assert end.as_json()["state"] == "REVOKED"
            assert (await web.reader.cancel(task_id)).state == "REVOKED"  # once more


async def test_a_killed_workers_task_is_seen_to_begin_again(broker: str, valkey: Valkey) -> None:
    env = {"LEASE": str(LEASE)}
    async with side("celeriac", broker, valkey, **env) as web:
        task_id = await web.send("wait", 1)
        async with asyncio.timeout(20), web.reader.follow(task_id) as events:
            while (await anext(events)).as_json()["state"] != "STARTED":
                pass
            web.worker.process.signal(signal.SIGKILL)
            options = "-Q", web.worker.queue
            with Worker("status_app", "celeriac", broker, valkey.celery_url, *options, **env):
                async with asyncio.timeout(LEASE + 8):
                    seen = states([each async for each in events])
        assert seen[-2:] == ["STARTED", "SUCCESS"]


async def test_with_a_status_store_of_its_own_all_is_told_there(
    broker: str, valkey: Valkey, tmp_path: Any
) -> None:
    with Valkey(tmp_path) as other:
        async with side("celeriac", broker, valkey, STATUS_STORE=other.redis_url) as web:
            with records.as_owner("alice"):
                task_id = await web.send("tell", 10)
            events = await web.follow(task_id, after=0)
            assert states(events) == ["STARTED", "PROGRESS", "SUCCESS"]
            assert len(events) == 13
            record = (await web.reader.snapshot(task_id)).record
            assert record is not None
            assert record.owner == "alice"
            task_id = await web.send("wait", 0, countdown=60)
            await web.reader.cancel(task_id)
            assert (await web.follow(task_id))[-1].as_json()["state"] == "REVOKED"
            web.app.backend._status.close()


async def test_a_handle_is_awaited_and_many_as_they_end(broker: str, valkey: Valkey) -> None:
    async with side("celeriac", broker, valkey) as web:

        def signature(name: str, *args: object) -> Any:
            return web.app.signature(f"status_app.{name}", args, queue=web.worker.queue)

        handle = await adelay(signature("add", 1, 2))
        assert await handle.result(timeout=10) == 3
        assert (handle.get(timeout=5), handle.info, handle.state) == (3, 3, "SUCCESS")
        with pytest.raises(PublicError):
            await (await adelay(signature("refuse"))).result(timeout=10)
        slow = await adelay(signature("wait", 30))
        with pytest.raises(TimeoutError):
            await slow.result(timeout=0.2)
        quick = [await adelay(signature("wait", seconds)) for seconds in (0.6, 0.3, 0.0)]
        ended = [each.id async for each in as_completed(quick, timeout=10)]
        assert ended == [each.id for each in quick[::-1]]
        with pytest.raises(TimeoutError, match="1 tasks have not ended"):
            async for _ in as_completed([slow], timeout=0.2):
                pass
        await web.reader.cancel(slow.id)
        with pytest.raises(TaskRevokedError):
            await slow.result(timeout=10)
    web.app.conf.task_always_eager = True

    @web.app.task(shared=False)
    async def double(x: int) -> int:
        return 2 * x

    assert await (await double.adelay(4)).result() == 8


async def test_a_handle_gives_the_type_of_a_task_that_is_made_here(
    broker: str, valkey: Valkey
) -> None:
    async with side("celeriac", broker, valkey) as web:
        signature = web.app.signature("status_app.add", (1, 2), queue=web.worker.queue)
        sent = await adelay(signature)
        assert isinstance(await sent.result(timeout=10), int)

        @web.app.task(shared=False, pydantic=True, name="status_app.add")
        def add(x: int, y: int) -> Decimal:
            return Decimal(x + y)

        web.app.finalize()
        for each in (sent, handle(web.app.AsyncResult(sent.id))):
            assert isinstance(await each.result(timeout=10), Decimal)
            assert isinstance(each.get(), int)


async def test_a_web_process_ends_what_the_only_worker_left(broker: str, valkey: Valkey) -> None:
    """No worker comes to say so."""
    async with side(
        "celeriac", broker, valkey, LEASE=str(LEASE), CONF='{"task_acks_late": 0}'
    ) as web:
        web.app.conf.task_acks_late = False
        task_id = await web.send("wait", 60)
        await asyncio.to_thread(web.worker.noted, "started")
        adopt(web.app, lease=LEASE)
        with watching_runs(web.app):
            web.worker.process.signal(signal.SIGKILL)
            async with asyncio.timeout(LEASE + 8):
                *_, end = await web.follow(task_id)
        assert isinstance(end, Status)
        assert (end.state, end.code) == ("FAILURE", "WorkerLostError")
