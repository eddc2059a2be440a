"""What workers tell of their tasks, in every pool, to whoever follows them."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import Ignore, TaskRevokedError

from celeriac import adelay, adopt, records
from celeriac.app import watching_runs
from celeriac.embedded import Valkey
from celeriac.errors import PublicError
from celeriac.handle import as_completed, handle
from celeriac.status import Event, Reader, Status
from support import close_results, empty_redis, eventually, given
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
            child, retried = await web.send("parent"), await web.send("again")
        ids = [last.id, last.parent.id, body.id, *(each.id for each in body.parent.children)]
        ids += [child, retried]
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
                async with asyncio.timeout(LEASE + 5):
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
            async with asyncio.timeout(LEASE + 5):
                *_, end = await web.follow(task_id)
        assert isinstance(end, Status)
        assert (end.state, end.code) == ("FAILURE", "WorkerLostError")


async def test_what_is_cancelled_begins_with_no_hook_and_no_base_of_somebodys(
    pool: str, broker: str, valkey: Valkey
) -> None:
    app = Celery("web", broker=broker, backend=valkey.celery_url, set_as_current=False)
    app.conf.broker_pool_limit = 0
    adopt(app)
    names = "hooked", "hooked_async", "foreign", "foreign_async", "foreign_retried"
    queue = f"refused-{pool}"
    async with Reader(app) as reader:
        ids = []
        for name in names:
            signature = app.signature(f"status_app.{name}", queue=queue)
            sent = await asyncio.to_thread(signature.apply_async)
            assert (await reader.cancel(sent.id)).state == "REVOKED"
            ids.append(sent.id)
        async with side(pool, broker, valkey, "-Q", queue) as web:
            after = await asyncio.to_thread(
                app.signature("status_app.foreign_async", queue=queue).apply_async
            )
            assert states(await web.follow(after.id))[-1] == "SUCCESS"
            for task_id in ids:
                assert states(await web.follow(task_id, after=0)) == ["REVOKED"]
            eventually(lambda: not web.worker.notes.exists("celeriac:runs"))
            assert web.worker.notes.lrange("note:started", 0, -1) == [b"body"]
    close_results(app.backend)


async def test_a_cancelled_task_that_its_result_does_not_outlast_never_begins(
    broker: str, valkey: Valkey
) -> None:
    app = Celery("web", broker=broker, backend=valkey.celery_url, set_as_current=False)
    app.conf.update(broker_pool_limit=0, result_expires=1)
    adopt(app)
    signature = app.signature("status_app.wait", (0,), queue="outlasts")
    sent = await asyncio.to_thread(signature.apply_async)
    far = await asyncio.to_thread(signature.apply_async, countdown=2 * 86400)
    async with Reader(app) as reader:
        for each in (sent, far):
            await reader.cancel(each.id)
        lasts = app.backend.client.ttl(records.key_of("", far.id))
        assert lasts > records.UNTOUCHED + 2 * 86400 - 60
        await asyncio.sleep(1.5)
        assert app.AsyncResult(sent.id).state == "PENDING"  # its result has expired
        assert (await reader.cancel(sent.id)).state == "REVOKED"
        async with side("celeriac", broker, valkey, "-Q", "outlasts") as web:
            web.worker.process.wait_for(sent.id)
            after = await asyncio.to_thread(
                app.signature("status_app.add", (1, 2), queue="outlasts").apply_async
            )
            assert states(await web.follow(after.id))[-1] == "SUCCESS"
            assert states(await web.follow(sent.id, after=0)) == ["REVOKED"]
            assert not web.worker.notes.exists("note:started")
    close_results(app.backend)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "elsewhere"])
async def test_what_runs_longer_than_results_last_is_not_called_revoked_at_once(
    elsewhere: bool, valkey: Valkey, tmp_path: Any
) -> None:
    """Whether its start is told or not, it is told to stop, and ends then."""
    empty_redis(valkey.celery_url)
    for conf in ('{"result_expires": 1}', '{"result_expires": 1, "task_track_started": false}'):
        with Valkey(tmp_path) as other:
            env = {"CONF": conf} | ({"STATUS_STORE": other.redis_url} if elsewhere else {})
            async with side("threads", valkey.celery_url, valkey, **env) as web:
                task_id = await web.send("wait_sync", 3)
                await asyncio.to_thread(web.worker.noted, "started")
                await asyncio.sleep(1.5)
                assert (await web.reader.cancel(task_id)).state in ("STARTED", "PENDING")
                assert states(await web.follow(task_id))[-1] == "SUCCESS"
                if elsewhere:
                    record = records.key_of("", task_id)
                    assert web.app.backend.client.hgetall(record) == {b"c": b"1"}
                    web.app.backend._status.close()


async def test_states_from_asyncio_tasks_of_the_body_come_in_order(
    pool: str, broker: str, valkey: Valkey
) -> None:
    async with side(pool, broker, valkey) as web:
        events = await web.follow(await web.send("step_together", 5), after=0)
        seen = states(events)
        assert seen[0] == "STARTED"
        assert seen[-1] == "SUCCESS"
        assert [each for each in seen if each.startswith("STEP")] == [f"STEP-{n}" for n in range(5)]
        assert seen.index("STEP-4") == len(seen) - 2


async def test_the_end_of_the_body_cuts_off_nothing_that_it_told(
    pool: str, broker: str, valkey: Valkey
) -> None:
    async with side(pool, broker, valkey) as web:
        for turns in range(20):
            events = await web.follow(await web.send("leave_at_once", turns), after=0)
            assert [each.state for each in events] == ["STARTED", None, "SUCCESS"]


async def test_an_eager_task_that_ends_with_ignore_has_ended(broker: str, valkey: Valkey) -> None:
    async with side("celeriac", broker, valkey) as web:

        @web.app.task(shared=False)
        def skip() -> None:
            raise Ignore

        task_id = (await asyncio.to_thread(skip.apply)).id
        events = await web.follow(task_id, after=0)
        assert states(events) == ["STARTED", "REVOKED"]
        assert (await web.reader.snapshot(task_id)).code == "Ignore"


async def test_what_ends_with_ignore_ends_for_those_who_follow(
    pool: str, broker: str, valkey: Valkey
) -> None:
    """Celery keeps the state as the body left it."""
    async with side(pool, broker, valkey) as web:
        for left, told in (
            (None, ["STARTED", "REVOKED"]),
            ("SKIPPED", ["STARTED", "SKIPPED", "REVOKED"]),
            ("SUCCESS", ["STARTED", "SUCCESS"]),
        ):
            task_id = await web.send("ignore", left)
            events = await web.follow(task_id, after=0)
            assert states(events) == told
            assert web.app.AsyncResult(task_id).state == (left or "STARTED")
            status = await web.reader.snapshot(task_id)
            assert status.state == told[-1]
            if left != "SUCCESS":
                assert (status.code, status.safe) == ("Ignore", True)
                with pytest.raises(TaskRevokedError, match="without a result"):
                    await handle(web.app.AsyncResult(task_id)).result(timeout=5)
        for name in ("hand_over", "hand_over_foreign"):
            events = await web.follow(await web.send(name), after=0)
            assert states(events) == ["STARTED", "STARTED", "SUCCESS"]


@pytest.mark.parametrize("plain_pool", ["prefork", "threads"])
async def test_what_a_worker_without_the_library_runs_does_not_expire(
    plain_pool: str, broker: str, valkey: Valkey
) -> None:
    app = Celery("web", broker=broker, backend=valkey.celery_url, set_as_current=False)
    app.conf.broker_pool_limit = 0
    adopt(app)
    with Worker("plain_app", plain_pool, broker, valkey.celery_url) as worker:
        signature = app.signature("plain_app.wait", (5,), queue=worker.queue, expires=1)
        sent = await asyncio.to_thread(signature.apply_async)
        waiting = app.signature("plain_app.wait", (0,), queue="nobodys", expires=1)
        never = await asyncio.to_thread(waiting.apply_async)
        async with Reader(app) as reader, asyncio.timeout(20):
            worker.process.wait_for(sent.id)
            async with reader.follow(sent.id) as events:
                await asyncio.sleep(2.5)
                assert (await reader.snapshot(sent.id)).state == "PENDING"
                assert (await reader.snapshot(never.id)).state == "REVOKED"
                assert states([each async for each in events]) == ["PENDING", "SUCCESS"]
            assert app.AsyncResult(never.id).state == "PENDING"  # which nobody can be sure of
            with pytest.raises(TaskRevokedError, match=r"^expired$"):
                await handle(never).result()
    close_results(app.backend)


async def test_what_runs_without_saying_so_does_not_expire(broker: str, valkey: Valkey) -> None:
    """Nor is its retry refused."""
    conf = '{"task_track_started": false}'
    async with side("celeriac", broker, valkey, CONF=conf) as web:
        task_id = await web.send("wait", 4, expires=1)
        await asyncio.to_thread(web.worker.noted, "started")
        await asyncio.sleep(2.1)
        assert (await web.reader.snapshot(task_id)).state == "PENDING"
        done = web.app.backend.cancel(task_id, "expired", expired=True)
        assert done
        assert states(await web.follow(task_id))[-1] == "SUCCESS"


async def test_what_celerys_own_revoke_catches_reads_revoked_and_never_begins(
    pool: str, broker: str, valkey: Valkey
) -> None:
    """In the queue, held until its time, and in the pool behind others."""
    async with side(pool, broker, valkey) as web:
        later = await web.send("wait", 0, countdown=60)
        await asyncio.to_thread(web.worker.process.wait_for, later)
        # A solo worker hears of nothing while it works.
        others = {"celeriac": 50, "threads": 8, "prefork": 2, "solo": 0}[pool]
        for _ in range(others):
            await web.send("wait_sync", 4)
        waiting = [await web.send("wait_sync", 0) for _ in range(5 if others else 0)]
        for _ in range(others):
            await asyncio.to_thread(web.worker.noted, "started")
        revoked = [later, *waiting]
        # At once: what blocks the worker ends soon.
        await asyncio.to_thread(web.app.control.revoke, revoked)
        last = await web.send("add", 1, 2)
        assert states(await web.follow(last))[-1] == "SUCCESS"
        for task_id in revoked:
            assert states(await web.follow(task_id, after=0)) == ["REVOKED"]
            assert web.app.AsyncResult(task_id).state == "REVOKED"
        assert not web.worker.notes.exists("note:started")


async def test_what_celerys_own_revoke_made_revoked_begins_at_no_later_worker(
    broker: str, valkey: Valkey
) -> None:
    """The one that heard of it is gone, and never had the message."""
    async with side("celeriac", broker, valkey) as web:
        signature = web.app.signature("status_app.wait", (0,), queue="not-yet")
        task_id = (await asyncio.to_thread(signature.apply_async)).id
        await asyncio.to_thread(web.worker.control, "ping")  # it listens
        await asyncio.to_thread(web.app.AsyncResult(task_id).revoke)
        assert states(await web.follow(task_id))[-1] == "REVOKED"
    async with side("celeriac", broker, valkey, "-Q", "not-yet") as web:
        web.worker.process.wait_for(task_id)
        after = web.app.signature("status_app.add", (1, 2), queue="not-yet")
        sent = await asyncio.to_thread(after.apply_async)
        assert states(await web.follow(sent.id))[-1] == "SUCCESS"
        assert states(await web.follow(task_id, after=0)) == ["REVOKED"]
        assert not web.worker.notes.exists("note:started")
