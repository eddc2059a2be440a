"""The pool for async tasks: what it keeps of Celery's others, and what it does better."""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult
from redis import Redis

from celeriac import adopt
from celeriac.embedded import Valkey
from support import close_results, empty_redis, eventually, given
from workers import BROKERS, POOLS, Worker

LATE = json.dumps({"task_acks_late": True, "worker_prefetch_multiplier": 1})


@pytest.fixture(scope="module", params=BROKERS)
def servers(request: pytest.FixtureRequest, valkey: Valkey) -> tuple[str, str]:
    """A broker and a result backend."""
    backend = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(backend)
    return (given("TEST_AMQP_URL") if request.param == "rabbitmq" else backend), backend


@pytest.fixture(scope="module")
def worker(servers: tuple[str, str]) -> Iterator[Worker]:
    with Worker("pool_app", "celeriac", *servers, "-c", "1000", CONF=LATE) as running:
        yield running


def test_hundreds_of_bodies_wait_at_once_in_one_process(worker: Worker) -> None:
    began = time.monotonic()
    sent = [worker.send("wait", 1.0) for _ in range(300)]
    assert {result.get(timeout=30) for result in sent} == {"waited"}
    assert time.monotonic() - began < 30  # one after the other, they would take 300 s


def test_stats_have_the_shape_of_preforks(worker: Worker) -> None:
    pool = worker.control("stats")["pool"]
    assert pool["implementation"] == "celeriac.pool:TaskPool"
    assert pool["max-concurrency"] == 1000
    assert pool["processes"] == [worker.control("stats")["pid"]]
    assert {"max-tasks-per-child", "put-guarded-by-semaphore", "timeouts", "writes"} <= set(pool)


def test_remote_control_answers_while_hundreds_of_bodies_run_and_a_thread_blocks(
    worker: Worker,
) -> None:
    waiting = [worker.send("wait", 20, f"busy-{n}") for n in range(200)]
    blocking = worker.send("block", 3)
    for n in range(200):
        worker.noted(f"busy-{n}-started")
    worker.noted("block-started")
    began = time.monotonic()
    assert worker.control("ping") == {"ok": "pong"}
    assert len(worker.control("active")) >= 200
    assert time.monotonic() - began < 2
    ids = [result.id for result in waiting]
    worker.client.control.revoke(ids, terminate=True, destination=[worker.node])
    assert blocking.get(timeout=10) == "blocked"
    for n in range(200):
        assert worker.noted(f"busy-{n}-ended") == "CancelledError"


def test_revoke_with_terminate_cancels_one_body_and_stores_revoked(worker: Worker) -> None:
    doomed, spared = worker.send("wait", 30, "doomed"), worker.send("wait", 1.5, "spared")
    worker.noted("doomed-started")
    doomed.revoke(terminate=True)
    assert worker.noted("doomed-ended") == "CancelledError"
    with pytest.raises(TaskRevokedError):
        doomed.get(timeout=10)
    assert spared.get(timeout=10) == "waited"
    assert doomed.state == "REVOKED"


def test_a_revoked_body_that_goes_on_to_an_end_of_its_own_stays_revoked(worker: Worker) -> None:
    task = worker.send("stubborn")
    assert worker.noted("stubborn") == "started"
    task.revoke(terminate=True)
    assert worker.noted("stubborn") == "caught"
    signals = worker.noted(f"signals-{task.id}")
    assert "postrun True None" in signals
    assert task.state == "REVOKED"


def test_the_hard_time_limit_cancels_the_body(worker: Worker) -> None:
    task = worker.send("hard")
    with pytest.raises(TimeLimitExceeded):
        task.get(timeout=10)
    assert worker.noted("hard") == "cleaned up"


def test_the_soft_time_limit_can_be_caught_in_the_body(worker: Worker) -> None:
    assert worker.send("soft").get(timeout=10) == "in time"


def test_limits_given_with_the_call_hold(worker: Worker) -> None:
    task = worker.send("wait", 30, "limited", soft_time_limit=0.5)
    assert "SoftTimeLimitExceeded" in repr(task.get(timeout=10, propagate=False))
    assert worker.noted("limited-ended") == "SoftTimeLimitExceeded"


def test_a_synchronous_task_with_a_time_limit_is_named_at_start(worker: Worker) -> None:
    said = worker.process.wait_for(
        r"not kept here: (.*?); run them in a worker whose worker_pool is (.*)$"
    )
    assert said[1] == "pool_app.limited_and_synchronous"
    assert said[2] == "prefork"


def test_a_body_that_blocks_the_loop_is_named_with_where_it_stands(worker: Worker) -> None:
    task = worker.send("block_loop", 2.5)
    assert task.get(timeout=10) == "blocked"
    worker.process.wait_for(rf"pool_app.block_loop\[{task.id}\] has blocked the event loop")
    worker.process.wait_for(r"in block_loop\n\s+time\.sleep\(seconds\)")


def test_signals_come_with_the_right_request(worker: Worker) -> None:
    task = worker.send("wait", 0.01)
    assert task.get(timeout=10) == "waited"
    assert worker.noted(f"signals-{task.id}") == "['prerun True', 'postrun True SUCCESS']"


def test_bodies_that_send_with_delay_do_not_wait_for_each_others_producers(worker: Worker) -> None:
    senders = [worker.send("send_on", 3) for _ in range(30)]
    for sender in senders:
        for sent in sender.get(timeout=30):
            assert AsyncResult(sent, app=worker.client).get(timeout=30) == "waited"


def test_what_a_body_sends_has_it_as_parent(worker: Worker) -> None:
    parent = worker.send("send_child")
    child = AsyncResult(parent.get(timeout=10), app=worker.client)
    assert child.get(timeout=10) == [parent.id, parent.id]


def test_a_body_that_exits_is_a_failure_and_no_end_of_the_worker(worker: Worker) -> None:
    result = worker.send("exit_process").get(timeout=10, propagate=False)
    assert "WorkerLostError" in repr(result)
    assert worker.control("ping") == {"ok": "pong"}


def test_rate_limits_and_etas_hold(worker: Worker) -> None:
    times = sorted(worker.send("rated").get(timeout=20) for _ in range(3))
    assert times[2] - times[0] > 0.8
    began = time.monotonic()
    assert worker.send("wait", 0, countdown=1).get(timeout=20) == "waited"
    assert time.monotonic() - began > 0.9
    expired = worker.send("wait", 0, countdown=1, expires=0.5)
    with pytest.raises(TaskRevokedError):
        expired.get(timeout=20)


def test_a_hundred_tasks_run_at_once_where_nobody_says_how_many(valkey: Valkey) -> None:
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", "celeriac", *urls, "-c", "0") as worker:
        assert worker.control("stats")["pool"]["max-concurrency"] == 100


def test_the_pool_grows_and_shrinks(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, "-c", "1") as worker:
        first, second = worker.send("wait", 20, "first"), worker.send("wait", 20, "second")
        worker.noted("first-started")
        assert worker.notes.llen("note:second-started") == 0
        worker.control("pool_grow", n=2)
        worker.noted("second-started")
        worker.control("pool_shrink", n=1)
        assert worker.control("stats")["pool"]["max-concurrency"] == 2
        for task in (first, second):
            task.revoke(terminate=True)
        worker.noted("second-ended")


def test_a_task_revoked_while_it_waits_for_its_turn_never_starts(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, "-c", "1") as worker:
        worker.send("wait", 2, "running")
        worker.noted("running-started")
        queued = worker.send("wait", 0, "queued")
        eventually(lambda: len(worker.control("reserved")) == 1)
        queued.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            queued.get(timeout=10)
        assert worker.noted("running-ended") == "returned"
        assert worker.send("wait", 0).get(timeout=10) == "waited"
        assert worker.notes.llen("note:queued-started") == 0


def test_a_warm_shutdown_finishes_what_runs_and_gives_the_rest_back(
    servers: tuple[str, str],
) -> None:
    with Worker("pool_app", "celeriac", *servers, "-c", "1", CONF=LATE) as worker:
        running = worker.send("wait", 2, "warm")
        worker.noted("warm-started")
        rest = [worker.send("wait", 0, "rest") for _ in range(3)]
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert running.get(timeout=1) == "waited"
        assert [result.state for result in rest] == ["PENDING"] * 3
        with Worker("pool_app", "celeriac", *servers, "-Q", worker.queue, CONF=LATE):
            assert [result.get(timeout=10) for result in rest] == ["waited"] * 3
        assert worker.notes.llen("note:warm-started") == 0  # it did not run again


def test_a_cold_shutdown_cancels_the_bodies_and_gives_them_back(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, CONF=LATE) as worker:
        tasks = [worker.send("wait", 3, "cold") for _ in range(5)]
        for _ in tasks:
            worker.noted("cold-started")
        worker.process.signal(signal.SIGQUIT)
        worker.process.wait()
        for _ in tasks:
            assert worker.noted("cold-ended") == "CancelledError"
        with Worker("pool_app", "celeriac", *servers, "-Q", worker.queue, CONF=LATE):
            assert [result.get(timeout=20) for result in tasks] == ["waited"] * 5


def test_a_cold_shutdown_does_not_wait_for_a_thread_that_blocks(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, CONF=LATE) as worker:
        worker.send("block", 60)
        worker.noted("block-started")
        worker.process.signal(signal.SIGQUIT)
        worker.process.wait(timeout=20)


def test_a_soft_shutdown_finishes_what_fits_and_gives_the_rest_back(
    servers: tuple[str, str],
) -> None:
    conf = json.dumps(json.loads(LATE) | {"worker_soft_shutdown_timeout": 2})
    with Worker("pool_app", "celeriac", *servers, CONF=conf) as worker:
        short, long = worker.send("wait", 1, "short"), worker.send("wait", 6, "long")
        worker.noted("short-started")
        worker.noted("long-started")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert short.get(timeout=1) == "waited"
        assert worker.noted("long-ended") == "CancelledError"
        with Worker("pool_app", "celeriac", *servers, "-Q", worker.queue, CONF=LATE):
            assert long.get(timeout=20) == "waited"
        assert worker.notes.llen("note:short-started") == 0  # it did not run again


def test_running_bodies_go_on_while_the_broker_is_away(valkey: Valkey, tmp_path: Path) -> None:
    with Valkey(tmp_path) as broker:
        urls = broker.celery_url, valkey.celery_url
        with Worker("pool_app", "celeriac", *urls, CONF=LATE) as worker:
            worker.send("tick", 6)
            worker.noted("tick-started")
            broker.stop()
            worker.process.wait_for("Trying again in")
            assert float(worker.noted("tick")) < 0.5
            broker.start()
            linked = worker.signature("wait", 0, "linked").set(immutable=True)
            assert worker.send("wait", 0, link=linked).get(timeout=30) == "waited"
            assert worker.noted("linked-ended") == "returned"
            with Redis.from_url(broker.redis_url) as client:
                # What ended meanwhile was acknowledged over the next connection.
                eventually(lambda: not client.hlen("unacked"))
        assert worker.process.output.count("pool_app.tick[") == 2  # received once, succeeded once


def test_running_bodies_go_on_while_the_result_backend_is_silent(
    valkey: Valkey, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as backend:
        assert backend.process is not None
        urls = valkey.celery_url, backend.celery_url
        with Worker("pool_app", "celeriac", *urls, CONF=LATE, NOTES=valkey.celery_url) as worker:
            worker.send("tick", 4)
            worker.noted("tick-started")
            ends_meanwhile = [worker.send("wait", 0.5, "meanwhile") for _ in range(50)]
            worker.noted("meanwhile-started")
            os.kill(backend.process.pid, signal.SIGSTOP)
            try:
                assert float(worker.noted("tick")) < 0.5
            finally:
                os.kill(backend.process.pid, signal.SIGCONT)
            assert {result.get(timeout=30) for result in ends_meanwhile} == {"waited"}


def test_any_result_backend_works(valkey: Valkey, tmp_path: Path) -> None:
    backend = f"db+sqlite:///{tmp_path / 'results.sqlite3'}"
    urls = valkey.celery_url, valkey.celery_url
    with Worker(
        "pool_app", "celeriac", *urls, CONF=json.dumps({"result_backend": backend})
    ) as worker:
        worker.client.conf.result_backend = backend
        sent = [worker.send("wait", 0.1) for _ in range(20)]
        assert {result.get(timeout=30) for result in sent} == {"waited"}


def test_a_transport_without_an_event_loop_works(valkey: Valkey, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / "queue") for name in ("data_folder_in", "data_folder_out")}
    (tmp_path / "queue").mkdir()
    options = folders | {"control_folder": str(tmp_path / "control")}
    conf = json.dumps({"broker_transport_options": options})
    with Worker("pool_app", "celeriac", "filesystem://", valkey.celery_url, CONF=conf) as worker:
        worker.client.conf.broker_transport_options = options
        sent = [worker.send("wait", 0.1) for _ in range(5)]
        assert {result.get(timeout=30) for result in sent} == {"waited"}
        assert worker.send("block", 0.1).get(timeout=10) == "blocked"
        last = worker.send("wait", 1, "last")
        worker.noted("last-started")
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert last.state == "SUCCESS"


@pytest.mark.parametrize("pool", POOLS)
def test_one_database_engine_serves_a_thousand_tasks_that_retry(
    pool: str, valkey: Valkey, database_url: str
) -> None:
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    scheme, _, rest = database_url.partition(":")
    url = f"{driver[scheme.partition('+')[0]]}:{rest}"
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", pool, *urls, DATABASE_URL=url) as worker:
        count = 1000 if pool == "celeriac" else 100
        sent = [worker.send("query", number) for number in range(count)]
        assert [result.get(timeout=90) for result in sent] == list(range(count))
        assert "different loop" not in worker.process.output


def test_a_hundred_bodies_that_retry_at_once_do_not_wait_for_each_others_producers(
    worker: Worker,
) -> None:
    sent = [worker.send("retry_three_times") for _ in range(150)]
    assert {result.get(timeout=30) for result in sent} == {3}


def test_an_asyncio_task_that_exits_ends_neither_the_loop_nor_the_worker(worker: Worker) -> None:
    running = worker.send("wait", 2, "beside-exit")
    worker.noted("beside-exit-started")
    assert "WorkerLostError" in repr(worker.send("exit_in_child").get(timeout=10, propagate=False))
    assert running.get(timeout=10) == "waited"


def test_a_synchronous_task_has_its_turn_among_many_async_ones(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, "-c", "5") as worker:
        first = [worker.send("wait", 0.5, "first") for _ in range(5)]
        synchronous = worker.send("block", 0)
        after = [worker.send("wait", 0.1, "after") for _ in range(150)]
        assert synchronous.get(timeout=20) == "blocked"
        assert after[-1].state == "PENDING"
        assert first[0].get(timeout=10) == "waited"


def test_a_pool_that_grew_runs_more_synchronous_tasks_at_once(servers: tuple[str, str]) -> None:
    with Worker("pool_app", "celeriac", *servers, "-c", "1") as worker:
        worker.control("pool_grow", n=9)
        began = time.monotonic()
        sent = [worker.send("block", 1) for _ in range(5)]
        assert {result.get(timeout=20) for result in sent} == {"blocked"}
        assert time.monotonic() - began < 4  # one after the other, they would take 5 s


def test_a_result_backend_that_refuses_a_time_out_does_not_end_the_worker(
    valkey: Valkey, tmp_path: Path
) -> None:
    results = tmp_path / "results.sqlite3"
    conf = json.dumps({"result_backend_max_retries": 0})
    with Worker(
        "pool_app", "celeriac", valkey.celery_url, f"db+sqlite:///{results}",
        NOTES=valkey.celery_url, CONF=conf,
    ) as worker:  # fmt: skip
        assert worker.send("wait", 0, "before").get(timeout=10) == "waited"
        beside = worker.send("wait", 5, "beside-refusal")
        worker.noted("beside-refusal-started")
        worker.send("hard")
        worker.process.wait_for(r"Task pool_app\.hard\[\S+\] received")
        with closing(sqlite3.connect(results)) as database:
            database.execute("ALTER TABLE celery_taskmeta RENAME TO away")
        worker.process.wait_for(r"what happened to pool_app\.hard\[\S+\] was not noted")
        with closing(sqlite3.connect(results)) as database:
            database.execute("ALTER TABLE away RENAME TO celery_taskmeta")
        assert beside.get(timeout=15) == "waited"


def test_an_async_task_run_by_synchronous_code_on_the_loop_is_an_error_and_no_standstill(
    worker: Worker,
) -> None:
    task = worker.send("eager_in_run_sync")
    assert "an async task cannot run eagerly here" in repr(task.get(timeout=10, propagate=False))
    assert worker.send("wait", 0, "after-eager").get(timeout=10) == "waited"


def test_a_retry_written_late_does_not_hide_the_end(valkey: Valkey) -> None:
    app = adopt(Celery("late", backend=valkey.celery_url, set_as_current=False))
    backend = app.backend
    for end in ("SUCCESS", "FAILURE"):
        task_id = f"late-{os.urandom(4).hex()}"
        backend.mark_as_retry(task_id, ValueError("again"), request=None)
        assert backend.get_state(task_id) == "RETRY"
        if end == "SUCCESS":
            backend.mark_as_done(task_id, 1)
        else:
            backend.mark_as_failure(task_id, ValueError("never"))
        backend.mark_as_retry(task_id, ValueError("again"), request=None)
        assert backend.get_state(task_id) == end
    close_results(backend)
