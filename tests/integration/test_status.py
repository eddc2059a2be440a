"""Following a task over a real Redis, the states written as a worker writes them."""

import asyncio
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, states
from redis import Redis

from celeriac import ConfigurationError, adelay, adopt, records
from celeriac.embedded import Valkey
from celeriac.errors import PoisonError, PublishError, ServiceError, UnknownTaskError
from celeriac.events import of_own, of_state
from celeriac.status import Event, Reader, Status, reader_of
from celeriac.store import redis_url, status_connection
from support import close_results, eventually, free_port


@pytest.fixture
def app(redis_server: str) -> Iterator[Celery]:
    app = Celery("status", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    adopt(app)
    publish(app, "a")
    yield app
    close_results(app.backend)
    app.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


pytestmark = pytest.mark.anyio


class Step(str, Enum):  # noqa: UP042 - as people write it
    HALF = "HALF"


async def collect(events: AsyncIterator[Status | Event]) -> list[Any]:
    return [event async for event in events]


def publish(app: Celery, *task_ids: str, owner: str = "") -> None:
    """What the publishing of these tasks leaves in the status store."""
    book = records.book_of(app)
    assert book is not None
    for task_id in task_ids:
        book.note({"id": task_id, "task": "t", records.OWNER: owner}, "q")


def shown(event: Status | Event) -> dict[str, Any]:
    """What is shown of it, but for when it was."""
    return {name: each for name, each in event.as_json().items() if name != "time"}


def connections(url: str) -> set[str]:
    """The ids of those to this database."""
    gc.collect()  # those of clients that nobody holds any more are closed
    with Redis.from_url(redis_url(url)) as client:
        database = str(client.connection_pool.connection_kwargs.get("db", 0))
        open_here = {each["id"] for each in client.client_list() if each["db"] == database}
        return open_here - {str(client.client_id())}


async def test_the_present_state_comes_first_then_every_change_to_the_last(app: Celery) -> None:
    async with Reader(app) as reader, reader.follow("a") as events:
        assert shown(await anext(events)) == {"task_id": "a", "state": "PENDING", "id": 0}
        app.backend.store_result("a", {"pid": 1, "hostname": "h"}, states.STARTED)
        app.backend.store_result("a", {"done": 1}, "PROGRESS")
        app.backend.store_result("a", ValueError("again"), states.RETRY)
        app.backend.store_result("a", [1, 2], states.SUCCESS)
        error = {"error": "ValueError: again", "code": "ValueError"}
        assert [shown(event) for event in await collect(events)] == [
            {"task_id": "a", "id": 1, "state": "STARTED"},
            {"task_id": "a", "id": 2, "state": "PROGRESS", "result": {"done": 1}},
            {"task_id": "a", "id": 3, "state": "RETRY"} | error,
            {"task_id": "a", "id": 4, "state": "SUCCESS", "result": [1, 2]},
        ]


def test_who_has_read_in_a_loop_that_is_over_holds_no_app(valkey: Valkey) -> None:
    """As a script does that asks with `asyncio.run`, again and again."""
    app = Celery("over", backend=valkey.celery_url, set_as_current=False)
    adopt(app)

    async def ask(app: Celery) -> None:
        with pytest.raises(UnknownTaskError):
            await reader_of(app).snapshot("nobody's")

    asyncio.run(ask(app))
    close_results(app.backend)
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None


async def test_whoever_comes_after_the_end_gets_the_end(app: Celery) -> None:
    app.backend.store_result("a", ZeroDivisionError("division by zero"), states.FAILURE)
    async with Reader(app) as reader, reader.follow("a") as events:
        failed = Status(
            "a", "FAILURE", None, "ZeroDivisionError: division by zero", "ZeroDivisionError"
        )
        assert await collect(events) == [failed]
        assert await reader.snapshot("a") == failed


async def test_five_thousand_tasks_that_end_while_a_client_subscribes_miss_no_end(
    app: Celery,
) -> None:
    ids = [f"race-{n}" for n in range(5000)]
    publish(app, *ids)

    def work() -> None:
        for task_id in ids:
            app.backend.store_result(task_id, None, states.STARTED)
            app.backend.store_result(task_id, task_id, states.SUCCESS)

    async with Reader(app) as reader:

        async def watch(task_id: str) -> list[str]:
            await asyncio.sleep(random.random() * 4)
            async with reader.follow(task_id) as events:
                return [event.state for event in await collect(events)]

        worker = threading.Thread(target=work)
        watchers = [asyncio.create_task(watch(task_id)) for task_id in ids]
        worker.start()
        async with asyncio.timeout(60):
            seen = await asyncio.gather(*watchers)
        worker.join()
    order = ["PENDING", "STARTED", "SUCCESS"]
    for sequence in seen:  # from wherever it began, without a gap and without a repetition
        assert sequence == order[order.index(sequence[0]) :]
    # The race was one: clients came before, between and after.
    assert {sequence[0] for sequence in seen} >= {"PENDING", "SUCCESS"}


async def test_a_thousand_reconnects_in_the_middle_of_a_stream_lose_and_repeat_nothing(
    app: Celery,
) -> None:
    rng = random.Random(5)

    def work() -> None:
        for n in range(900):
            app.backend.store_result("a", n, "PROGRESS")
            time.sleep(0.001)
        app.backend.store_result("a", None, states.SUCCESS)

    worker = threading.Thread(target=work)
    seen: list[int] = []
    last, reconnects = 0, 0
    async with Reader(app) as reader:
        worker.start()
        async with asyncio.timeout(60):
            while last < 901:
                left = rng.randrange(3)
                async with reader.follow("a", after=last) as events:
                    async for event in events:
                        assert event.id is not None
                        seen.append(event.id)
                        last = event.id
                        left -= 1
                        if left < 0:
                            break
                reconnects += 1
        # And from anywhere in it, now that it is over.
        while reconnects < 1000:
            start = rng.randrange(901)
            async with reader.follow("a", after=start) as events:
                assert (await anext(events)).id == start + 1
            reconnects += 1
    worker.join()
    assert seen == list(range(1, 902))


async def test_many_followers_of_many_tasks_share_one_connection(
    app: Celery, redis_server: str
) -> None:
    publish(app, *(f"t{n}" for n in range(50)))
    app.backend.client.ping()
    before = connections(redis_server)
    async with Reader(app) as reader:

        async def watch(task_id: str) -> list[Status]:
            async with reader.follow(task_id) as events:
                first = await anext(events)
                arrived.release()
                return [first, *await collect(events)]

        arrived = asyncio.Semaphore(0)
        watchers = [asyncio.create_task(watch(f"t{n % 50}")) for n in range(200)]
        for _ in watchers:
            await arrived.acquire()
        opened = connections(redis_server) - before
        assert len(opened) == 1
        for n in range(50):
            app.backend.store_result(f"t{n}", n, states.SUCCESS)
        for n, sequence in enumerate(await asyncio.gather(*watchers)):
            assert [event.state for event in sequence] == ["PENDING", "SUCCESS"]
            assert sequence[1].result == n % 50
    eventually(lambda: connections(redis_server) <= before, what="all that was opened is closed")


async def test_nothing_is_left_when_followers_leave_early(app: Celery, redis_server: str) -> None:
    before = connections(redis_server)
    tasks = len(asyncio.all_tasks())
    reader = Reader(app)
    for _ in range(200):
        async with reader.follow("a") as events:
            await anext(events)
    eventually(lambda: connections(redis_server) <= before, what="all that was opened is closed")
    assert len(asyncio.all_tasks()) == tasks
    with Redis.from_url(redis_url(redis_server)) as client:
        assert client.pubsub_numsub("celery-task-meta-a") == [(b"celery-task-meta-a", 0)]


async def test_a_lost_connection_is_made_again_and_no_state_is_lost_or_repeated(
    app: Celery, redis_server: str
) -> None:
    async with Reader(app) as reader, reader.follow("a") as events:
        assert (await anext(events)).state == "PENDING"
        with Redis.from_url(redis_url(redis_server)) as client:
            client.client_kill_filter(_type="pubsub")
        app.backend.store_result("a", None, states.STARTED)
        assert (await anext(events)).state == "STARTED"
        with Redis.from_url(redis_url(redis_server)) as client:
            client.client_kill_filter(_type="pubsub")
        app.backend.store_result("a", 1, states.SUCCESS)
        assert [event.state for event in await collect(events)] == ["SUCCESS"]


async def test_a_server_that_dies_and_returns_ends_no_follower(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        app = adopt(Celery("restart", backend=server.celery_url, set_as_current=False))
        publish(app, "a")
        async with Reader(app) as reader, reader.follow("a") as events:
            assert (await anext(events)).state == "PENDING"
            await asyncio.to_thread(server.stop)
            with pytest.raises(ServiceError, match=r"silent since 0\.1 s"):
                await reader.snapshot("a", timeout=0.1)
            await asyncio.to_thread(server.start)
            app.backend.store_result("a", 1, states.SUCCESS)
            async with asyncio.timeout(10):
                assert [event.state for event in await collect(events)] == ["SUCCESS"]
        close_results(app.backend)


async def test_a_server_that_is_killed_under_five_hundred_followers_loses_none(
    tmp_path: Path,
) -> None:
    with Valkey(tmp_path) as server:
        app = adopt(Celery("killed", backend=server.celery_url, set_as_current=False))
        ids = [f"t{n}" for n in range(500)]
        publish(app, *ids)

        def end(task_ids: list[str]) -> None:
            for task_id in task_ids:
                app.backend.store_result(task_id, task_id, states.SUCCESS)

        async with Reader(app) as reader:

            async def watch(task_id: str) -> list[Status | Event]:
                async with reader.follow(task_id) as events:
                    first = await anext(events)
                    begun.release()
                    return [first, *await collect(events)]

            begun = asyncio.Semaphore(0)
            watchers = [asyncio.create_task(watch(task_id)) for task_id in ids]
            for _ in ids:
                await begun.acquire()
            await asyncio.to_thread(end, ids[:100])
            assert server.process is not None
            server.process.kill()
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(end, ids[100:])
            async with asyncio.timeout(30):
                seen = await asyncio.gather(*watchers)
        for task_id, states_seen in zip(ids, seen, strict=True):
            assert [(each.state, each.result) for each in states_seen] == [
                ("PENDING", None),
                ("SUCCESS", task_id),
            ]
        close_results(app.backend)


async def test_a_snapshot_of_an_absent_server_is_one_error_in_time() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    app = adopt(Celery("absent", backend=url, set_as_current=False))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ServiceError):
        await Reader(app).snapshot("a", timeout=0.3)
    assert loop.time() - began < 2


async def test_a_slow_follower_reads_on_from_where_it_was_and_delays_nobody(app: Celery) -> None:
    async with Reader(app) as reader, reader.follow("a") as slow, reader.follow("a") as fast:
        assert (await anext(slow)).state == (await anext(fast)).state == "PENDING"
        for n in range(900):
            app.backend.store_result("a", n, "PROGRESS")
        app.backend.store_result("a", None, states.SUCCESS)
        async with asyncio.timeout(10):
            for follower in (fast, slow):
                *steps, last = await collect(follower)
                assert [step.result for step in steps] == list(range(900))
                assert last.state == "SUCCESS"
                assert all(step.recovered for step in steps)


async def test_who_missed_more_than_is_kept_is_told_so(app: Celery) -> None:
    async with Reader(app) as reader, reader.follow("a") as slow, reader.follow("a") as fast:
        assert (await anext(slow)).state == "PENDING"
        for n in range(3000):
            app.backend.store_result("a", n, "PROGRESS")
        app.backend.store_result("a", 5, states.SUCCESS)
        async with asyncio.timeout(10):
            await collect(fast)
            *steps, last = await collect(slow)
        assert [step.result for step in steps] == list(range(len(steps)))
        assert len(steps) < 3000
        assert (last.state, last.result, last.recovered) == ("SUCCESS", 5, False)
        assert last.as_json()["recovered"] is False
        async with reader.follow("a", after=1) as late:
            (only,) = await collect(late)
        assert (only.state, only.recovered) == ("SUCCESS", False)
        async with reader.follow("a", after=2990) as late:
            *steps, last = await collect(late)
        assert [step.result for step in steps] == list(range(2990, 3000))
        assert last.recovered


async def test_a_number_that_was_never_given_is_no_place_to_go_on_from(app: Celery) -> None:
    app.backend.store_result("a", None, states.STARTED)
    async with Reader(app) as reader, reader.follow("a", after=7) as events:
        first = await anext(events)
        assert (first.state, first.id, first.recovered) == ("STARTED", 1, False)


async def test_nothing_is_known_of_a_task_that_was_never_published(app: Celery) -> None:
    async with Reader(app) as reader:
        with pytest.raises(UnknownTaskError, match="never published"):
            await reader.snapshot("nobody")
        async with reader.follow("nobody") as events:
            with pytest.raises(UnknownTaskError):
                await anext(events)


async def test_a_worker_without_the_library_is_followed_by_what_celery_stores(
    app: Celery, redis_server: str
) -> None:
    plain = Celery("plain", backend=redis_server, set_as_current=False)
    async with Reader(app) as reader, reader.follow("a") as events:
        assert (await anext(events)).state == "PENDING"
        plain.backend.store_result("a", {"pid": 1}, states.STARTED)
        plain.backend.store_result("a", 1, "PROGRESS")
        plain.backend.store_result("a", 2, "PROGRESS")
        plain.backend.store_result("a", [3], states.SUCCESS)
        seen = [(each.state, each.result) for each in await collect(events)]
        assert seen == [("STARTED", None), ("PROGRESS", 1), ("PROGRESS", 2), ("SUCCESS", [3])]
        assert (await reader.snapshot("a")).result == [3]
    close_results(plain.backend)


async def test_a_status_store_of_its_own_carries_the_states(
    redis_server: str, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as other:
        app = Celery("apart", backend=redis_server, set_as_current=False)
        adopt(app, status_store=other.redis_url)
        publish(app, "a")
        async with Reader(app) as reader, reader.follow("a") as events:
            assert (await anext(events)).state == "PENDING"
            app.backend.store_result("a", 1, "PROGRESS")
            app.backend.store_result("a", 2, states.SUCCESS)
            assert [event.state for event in await collect(events)] == ["PROGRESS", "SUCCESS"]
            # Those of the reader, of who writes records and of who writes states.
            assert len(connections(other.celery_url)) == 3
        app.backend._status.close()
        app.backend.client.connection_pool.disconnect()
        assert app.AsyncResult("a").result == 2
        close_results(app.backend)


async def test_an_end_that_the_status_store_missed_is_told_all_the_same(
    redis_server: str, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as other:
        app = Celery("apart", backend=redis_server, set_as_current=False)
        adopt(app, status_store=other.redis_url)
        publish(app, "a")
        async with Reader(app) as reader, reader.follow("a") as events:
            assert (await anext(events)).state == "PENDING"
            await asyncio.to_thread(other.stop)
            await asyncio.to_thread(app.backend.store_result, "a", 7, states.SUCCESS)
            await asyncio.to_thread(other.start)
            async with asyncio.timeout(20):
                (end,) = await collect(events)
            assert (end.state, end.result) == ("SUCCESS", 7)
        app.backend._status.close()
        close_results(app.backend)


async def test_an_end_that_the_status_store_missed_is_seen_by_who_looks_later(
    redis_server: str, tmp_path: Path
) -> None:
    """And is written back: who follows, or resumes, is told."""
    with Valkey(tmp_path) as other:
        app = Celery("apart", backend=redis_server, set_as_current=False)
        adopt(app, status_store=other.redis_url)
        publish(app, "a", "b")
        for task_id in ("a", "b"):
            app.backend.store_result(task_id, None, states.STARTED)
        await asyncio.to_thread(other.stop)
        await asyncio.to_thread(app.backend.store_result, "a", 7, states.SUCCESS)
        await asyncio.to_thread(other.start)
        app.backend._status_away_until = 0.0  # of the worker's process, not of this one
        async with Reader(app) as reader:
            seen = await asyncio.gather(*(reader.snapshot("a") for _ in range(5)))
            assert {(each.state, each.result, each.id) for each in seen} == {("SUCCESS", 7, 2)}
            async with reader.follow("a", after=1) as events:
                assert [(each.state, each.id) for each in await collect(events)] == [("SUCCESS", 2)]
            assert (await reader.snapshot("b")).state == "STARTED"
        app.backend._status.close()
        close_results(app.backend)


async def test_with_a_status_store_of_its_own_no_late_run_tells_after_the_one_that_counts(
    redis_server: str, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as other:
        app = Celery("apart", backend=redis_server, set_as_current=False)
        adopt(app, status_store=other.redis_url)
        publish(app, "a")
        backend = app.backend
        progress = [("PROGRESS", of_state("PROGRESS", 1))]
        for token in ("first", "second"):
            event = of_state(states.STARTED)
            backend.show("a", "{}", states.STARTED, event, token=token)
            assert await backend.emit("a", None, token, 1, progress, "")
        assert not await backend.emit("a", None, "first", 2, progress, "")
        backend.store_result("a", 1, states.SUCCESS)
        assert not await backend.emit("a", None, "second", 2, progress, "")
        async with Reader(app) as reader, reader.follow("a", after=0) as events:
            seen = [event.state for event in await collect(events)]
        assert seen == ["STARTED", "PROGRESS", "STARTED", "PROGRESS", "SUCCESS"]
        backend._status.close()
        close_results(backend)


async def test_an_event_that_cannot_be_read_keeps_nobody_from_the_others(
    app: Celery, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish(app, "b")
    key, stream = "celeriac:task:a", "celeriac:events:a"
    with Redis.from_url(redis_url(redis_server)) as client:
        async with Reader(app) as reader, reader.follow("a") as a, reader.follow("b") as b:
            await anext(a)
            await anext(b)
            client.publish(stream, "nothing of ours")
            client.hset(key, mapping={"n": 1, "s": "1 {half"})
            client.xadd(stream, {"e": "{half"}, id="1-0")
            client.publish(stream, "1 {half")
            client.xadd(stream, {"e": "5"}, id="2-0")
            client.hset(key, "n", 2)
            assert (await reader.snapshot("a")).state == "PENDING"
            app.backend.store_result("b", 1, states.SUCCESS)
            app.backend.store_result("a", 1, "PROGRESS")
            app.backend.store_result("a", 2, states.SUCCESS)
            assert [each.state for each in await collect(b)] == ["SUCCESS"]
            async with asyncio.timeout(5):
                assert [(each.state, each.id) for each in await collect(a)] == [
                    ("PROGRESS", 3),
                    ("SUCCESS", 4),
                ]
    assert "event 1 of task a cannot be read" in caplog.text
    assert "is away" not in caplog.text
    assert "reading the status store failed" not in caplog.text


@pytest.mark.parametrize("state", ['50% "done"', "50%\n", Step.HALF, "PROGRESS", "Über"])
@pytest.mark.parametrize("value", [None, {"n": 1}])
async def test_a_state_of_any_name_can_be_followed(app: Celery, state: str, value: object) -> None:
    async with Reader(app) as reader, reader.follow("a") as events:
        await anext(events)
        app.backend.store_result("a", value, state)
        app.backend.store_result("a", value, states.SUCCESS)
        assert [each.state for each in await collect(events)] == [state, "SUCCESS"]


def test_what_nobody_could_read_is_refused_where_it_is_told() -> None:
    nested: list[Any] = []
    for _ in range(300):
        nested = [nested]
    for value in (10**5000, {"x": [10**5000]}, nested, "\ud800"):
        with pytest.raises(ValueError, match=r"."):
            of_own("n", value)
        assert json.loads(of_state("PROGRESS", value))["result"].startswith("not JSON: ")
    assert json.loads(of_own("n", "1" * 5000))["data"] == "1" * 5000


async def test_a_slow_follower_that_missed_what_is_not_kept_is_told_of_the_end(
    app: Celery, redis_server: str
) -> None:
    async with Reader(app) as reader, reader.follow("a") as slow, reader.follow("a") as fast:
        await anext(slow)
        await anext(fast)
        for n in range(256):
            app.backend.store_result("a", n, "PROGRESS")
        await asyncio.sleep(0.5)
        for _ in range(256):
            await anext(fast)
        with Redis.from_url(redis_url(redis_server)) as client:
            client.client_kill_filter(_type="pubsub")
        for n in range(2200):
            app.backend.store_result("a", n, "PROGRESS")
        app.backend.store_result("a", None, states.SUCCESS)
        await asyncio.sleep(1)
        async with asyncio.timeout(10):
            seen = await collect(slow)
        assert seen[-1].state == "SUCCESS"
        assert not all(each.recovered for each in seen)


@pytest.mark.parametrize(
    "setting", [("result_serializer", "pickle"), ("result_compression", "gzip")]
)
async def test_results_that_are_no_json_make_no_state_false_or_double(
    redis_server: str, setting: tuple[str, str]
) -> None:
    app = Celery("other", backend=redis_server, set_as_current=False)
    app.conf.update({"result_accept_content": ["json", "pickle"], setting[0]: setting[1]})
    adopt(app)
    publish(app, "a")
    async with Reader(app) as reader, reader.follow("a") as events:
        await anext(events)
        for state, value in (
            (states.STARTED, None),
            ("PROGRESS", {1: 2}),
            (states.SUCCESS, {1: 2}),
        ):
            app.backend.store_result("a", value, state)
            await asyncio.sleep(0.1)
            assert (await reader.snapshot("a")).state == state
        seen = [
            (each.state, each.as_json().get("result"), each.id) for each in await collect(events)
        ]
        assert seen == [
            ("STARTED", None, 1), ("PROGRESS", {"1": 2}, 2), ("SUCCESS", {"1": 2}, 3)
        ]  # fmt: skip
        assert app.AsyncResult("a").result == {1: 2} or setting[1] == "gzip"
        app.backend.store_result("a", ValueError(), states.FAILURE)
        assert not app.backend.cancel("a")
        assert (await reader.snapshot("a")).id == 3
    close_results(app.backend)


async def test_a_second_report_of_a_failure_is_not_told(app: Celery) -> None:
    """As of a worker whose process failed the task and was then lost."""
    app.backend.store_result("a", ValueError("first"), states.FAILURE)
    app.backend.store_result("a", ValueError("second"), states.FAILURE)
    async with Reader(app) as reader:
        status = await reader.snapshot("a")
    assert (status.id, status.error) == (1, "ValueError: first")


async def test_following_what_expires_much_later_leaves_nothing_behind(app: Celery) -> None:
    book = records.book_of(app)
    assert book is not None
    expires = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()
    ids = [f"late-{n}" for n in range(20)]
    for task_id in ids:
        book.note({"id": task_id, "task": "t", "expires": expires}, "q")
    async with Reader(app) as reader, reader.follow("a") as held:
        await anext(held)
        before = len(asyncio.all_tasks())
        for task_id in ids * 3:
            async with reader.follow(task_id) as events:
                await anext(events)
                assert len(asyncio.all_tasks()) <= before + 1
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == before


async def test_who_follows_after_the_reader_was_closed_is_told(app: Celery) -> None:
    reader = Reader(app)
    async with reader.follow("a") as first:
        await anext(first)
        await reader.aclose()
        async with reader.follow("a") as second:
            assert (await anext(second)).state == "PENDING"
            assert await collect(first) == []
        async with reader.follow("a") as third:
            await anext(third)
            app.backend.store_result("a", 1, states.SUCCESS)
            async with asyncio.timeout(5):
                assert [each.state for each in await collect(third)] == ["SUCCESS"]
    await reader.aclose()


def test_the_last_of_a_chain_is_known_as_long_as_its_first_may_wait(app: Celery) -> None:
    eta = datetime.fromtimestamp(time.time() + 60 * 86400, UTC).isoformat()
    later = {"task": "t", "options": {"task_id": "later"}}
    book = records.book_of(app)
    assert book is not None
    book.note({"id": "first", "task": "t", "eta": eta}, "q", {"chain": [later]})
    for task_id in ("first", "later"):
        assert app.backend.client.ttl(f"celeriac:task:{task_id}") > 89 * 86400


def test_of_our_errors_only_those_are_shown_that_name_no_address() -> None:
    told = of_state(states.FAILURE, PublishError("Error 111 connecting to redis.internal:6379"))
    assert "safe" not in json.loads(told)
    assert json.loads(of_state(states.FAILURE, PoisonError(3)))["safe"] is True


async def test_a_prefix_of_all_keys_is_honoured(redis_server: str) -> None:
    app = Celery("prefixed", backend=redis_server, set_as_current=False)
    app.conf.result_backend_transport_options = {"global_keyprefix": "mine:"}
    adopt(app)
    publish(app, "a")
    async with Reader(app) as reader, reader.follow("a") as events:
        await anext(events)
        app.backend.store_result("a", 1, states.SUCCESS)
        assert [event.result for event in await collect(events)] == [1]
        with Redis.from_url(redis_url(redis_server)) as client:
            assert all(key.startswith(b"mine:") for key in client.scan_iter())
    close_results(app.backend)


async def test_a_backend_that_cannot_publish_is_polled() -> None:
    app = adopt(Celery("memory", backend="cache+memory://", set_as_current=False))
    publish(app, "poll")
    async with Reader(app) as reader, reader.follow("poll") as events:
        assert (await anext(events)).state == "PENDING"
        app.backend.store_result("poll", KeyError("k"), states.FAILURE)
        assert (await anext(events)).error == "KeyError: k"
        assert await collect(events) == []
        assert (await reader.snapshot("poll")).state == "FAILURE"
        with pytest.raises(UnknownTaskError):
            await reader.snapshot("nobody")


async def test_a_stored_state_that_cannot_be_read_ends_with_the_reason(
    app: Celery, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Redis.from_url(redis_url(redis_server)) as client:
        client.delete("celeriac:task:a")
        client.set("celery-task-meta-a", b"{half a json")
    async with Reader(app) as reader, reader.follow("a") as events:
        (only,) = await collect(events)
    assert only.state == "FAILURE"
    assert only.error is not None
    assert only.error.startswith("unreadable: ")


async def test_somebody_elses_key_is_one_unreadable_task_and_no_lost_connection(
    app: Celery, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Redis.from_url(redis_url(redis_server)) as client:
        client.lpush("celery-task-meta-list", "x")
        client.set("celery-task-meta-empty", "{}")
    publish(app, "good")
    async with Reader(app) as reader, reader.follow("good") as good:
        assert (await anext(good)).state == "PENDING"
        for task_id in ("list", "empty"):
            status = await reader.snapshot(task_id)
            assert status.state == "FAILURE"
            assert status.error is not None
            assert status.error.startswith("unreadable: ")
        app.backend.store_result("good", 1, states.SUCCESS)
        assert [event.state for event in await collect(good)] == ["SUCCESS"]
    assert "is away" not in caplog.text


async def test_an_id_that_no_key_can_have_costs_no_follower_anything(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    async with Reader(app) as reader, reader.follow("a") as events:
        assert (await anext(events)).state == "PENDING"
        for _ in range(3):
            with pytest.raises(UnicodeEncodeError):
                await reader.snapshot("\ud800")
            with pytest.raises(UnicodeEncodeError):
                async with reader.follow("\ud800"):
                    pass
        app.backend.store_result("a", 1, states.SUCCESS)
        async with asyncio.timeout(1):
            assert [event.state for event in await collect(events)] == ["SUCCESS"]
        assert reader._snapshots == {}
    assert caplog.records == []  # the connection was never lost


async def test_a_reader_can_be_used_while_it_closes(app: Celery) -> None:
    reader = Reader(app)
    for _ in range(20):
        async with reader.follow("a") as events:
            await anext(events)
            closing = asyncio.create_task(reader.aclose())
            await asyncio.sleep(0)
            assert (await reader.snapshot("a", timeout=1)).state == "PENDING"
        await closing


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.5"), "1.5"),
        (b"ab", "YWI="),
        ({"x": [float("nan"), float("inf")]}, {"x": ["NaN", "Infinity"]}),
    ],
)
async def test_whatever_a_task_returns_goes_into_json(
    app: Celery, value: object, shown: object
) -> None:
    app.backend.store_result("a", value, states.SUCCESS)
    async with Reader(app) as reader:
        message = (await reader.snapshot("a")).as_json()
    assert json.loads(json.dumps(message, allow_nan=False))["result"] == shown


def test_a_status_store_that_is_no_redis_or_the_backend_itself_is_not_used(
    redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError, match="WS_MESSAGE_QUEUE is no URL of a Redis"):
        adopt(Celery("a", backend=redis_server), status_store="amqp://h")
    same = adopt(Celery("b", backend=redis_server), status_store=redis_server)
    assert not same.backend.shows_elsewhere
    memory = adopt(Celery("c", backend="cache+memory://"), status_store=redis_server)
    assert status_connection(memory) is None
    assert "WS_MESSAGE_QUEUE is not used" in caplog.text


async def test_sending_a_task_subscribes_to_nothing(app: Celery, redis_server: str) -> None:
    kept = [app.send_task("nobody") for _ in range(20)]
    kept += [await adelay(app.signature("nobody")) for _ in range(20)]
    with Redis.from_url(redis_url(redis_server)) as client:  # whose other databases others use
        subscribed = {channel.decode()[-36:] for channel in client.pubsub_channels()}
        assert not subscribed & {each.id for each in kept}
    del kept
    gc.collect()


async def test_waiting_for_a_result_still_works(app: Celery) -> None:
    result = app.AsyncResult("later")
    waiting = asyncio.create_task(asyncio.to_thread(result.get, timeout=10))
    await asyncio.to_thread(
        eventually, lambda: app.backend.client.pubsub_numsub("celery-task-meta-later")[0][1]
    )
    app.backend.store_result("later", 5, states.SUCCESS)
    assert await waiting == 5
    app.backend.result_consumer.stop()


def test_an_error_is_one_bounded_line() -> None:
    meta = {"status": "FAILURE", "result": {"exc_type": "E", "exc_message": ["a\nb" * 500]}}
    error = Status.from_meta("a", meta).error
    assert error is not None
    assert error.startswith("E: a ba b")
    assert len(error) == 500
