"""A worker that is told to end finishes what fits in its time, and leaves no wrong state."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.exceptions import WorkerLostError

from celeriac.embedded import Valkey
from support import empty_redis, eventually, given, wanted
from workers import Worker

LATE: dict[str, Any] = {"task_acks_late": True, "worker_prefetch_multiplier": 2}
GRACE = 1.0  # seconds
LONG = 60.0
POOLS = ["celeriac", "prefork", "threads", "solo"]
TERM, INT, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT


def worker(broker: str, valkey: Valkey, pool: str, *options: str, **conf: Any) -> Worker:
    variables = {"REMAP_SIGTERM": "remap", "SLOW_END": "slow_end"}
    env = {name: conf.pop(key) for name, key in variables.items() if key in conf}
    conf = {"task_track_started": True, "worker_soft_shutdown_timeout": GRACE, **conf}
    options = ("--without-mingle", "--without-gossip", *options)
    env |= {"CONF": json.dumps(conf), "LEASE": str(LONG)}
    return Worker("pool_app", pool, broker, valkey.celery_url, *options, **env)


def queued(worker: Worker) -> int:
    """How many messages wait in the worker's queue."""
    connection: Any = worker.client.connection_for_read()
    with connection:
        channel = connection.default_channel
        if hasattr(channel, "client"):
            return int(channel.client.llen(worker.queue))
        return int(channel.queue_declare(worker.queue, passive=True).message_count)


@pytest.fixture(params=["embedded", *wanted("rabbitmq", "TEST_AMQP_URL")])
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    empty_redis(valkey.celery_url)
    return given("TEST_AMQP_URL") if request.param == "rabbitmq" else valkey.celery_url


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def leaves_nothing(worker: Worker) -> bool:
    return not any(worker.notes.exists(key) for key in ("celeriac:runs", "unacked"))


def test_what_fits_in_the_time_ends_and_what_does_not_waits_again(
    pool: str, broker: str, valkey: Valkey
) -> None:
    with worker(broker, valkey, pool, **LATE) as ending:
        fits = ending.send("wait", 0 if pool == "solo" else 0.5, "fits")
        ending.noted("fits-started")
        late = ending.send("wait", LONG, "late")
        ending.noted("late-started")
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert fits.state == "SUCCESS"
        assert late.state == "PENDING"
        assert ending.noted("late-ended") != "returned"
        assert queued(ending) == 1
        assert leaves_nothing(ending)


def test_what_was_not_begun_goes_back_at_once_and_a_second_signal_gives_back_all(
    pool: str, broker: str, valkey: Valkey
) -> None:
    conf = LATE | {"worker_soft_shutdown_timeout": LONG}
    with worker(broker, valkey, pool, "-c", "3", **conf) as ending:
        later = ending.send("wait", 0, "later", countdown=LONG)
        early = ending.signature("wait_early", LONG).on_error(ending.signature("failed"))
        failing = [early.apply_async()]
        ending.noted("early-started")
        if pool != "solo":  # which does nothing beside its one task
            header = [ending.signature("wait_early", LONG)]
            failing.append(chord(header, ending.signature("wait", 0)).apply_async())
            late = ending.send("wait", LONG, "late")
            ending.noted("early-started")
            ending.noted("late-started")
            rest = [ending.send("wait", 0, "rest") for _ in range(2)]
            eventually(lambda: queued(ending) == 0)
        ending.process.signal(TERM)
        ending.process.wait_for("Warm shutdown")
        if pool != "solo":
            eventually(lambda: queued(ending) == 3)
            assert ending.process.running
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        for each in failing:
            with pytest.raises(Exception, match="was shut down"):
                each.get(timeout=1)
        assert "WorkerLostError" in ending.noted("errback")
        assert queued(ending) == (1 if pool == "solo" else 4)
        assert later.state == "PENDING"
        if pool != "solo":
            assert [each.state for each in (late, *rest)] == ["PENDING"] * 3
        assert leaves_nothing(ending)


@pytest.mark.parametrize("pool", ["celeriac", "threads", "solo"])
def test_a_body_that_blocks_is_left_behind_and_waits_again(pool: str, valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    with worker(valkey.celery_url, valkey, pool, **LATE) as ending:
        blocking = ending.send("block", LONG)
        ending.noted("block-started")
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert blocking.state == "PENDING"
        assert queued(ending) == 1
        assert leaves_nothing(ending)


@pytest.mark.parametrize("numbers", [[INT, INT], [QUIT], [TERM, TERM, TERM], []])
def test_any_way_to_end_leaves_the_same(numbers: list[signal.Signals], valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    grace = LONG if numbers else GRACE
    with worker(
        valkey.celery_url, valkey, "celeriac", worker_soft_shutdown_timeout=grace, **LATE
    ) as ending:
        late, early = ending.send("wait", LONG, "late"), ending.send("wait_early", LONG)
        ending.noted("late-started")
        ending.noted("early-started")
        for count, number in enumerate(numbers, 1):
            ending.process.signal(number)
            ending.process.wait_for("(Warm|Cold) shutdown", count=count)
        if not numbers:
            ending.client.control.shutdown(destination=[ending.node])
        assert ending.process.wait() == 0
        assert late.state == "PENDING"
        assert isinstance(early.result, WorkerLostError)
        assert queued(ending) == 1
        assert leaves_nothing(ending)


def test_without_a_time_all_is_finished_and_a_second_signal_still_ends_it(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    with worker(
        valkey.celery_url, valkey, "prefork", worker_soft_shutdown_timeout=0, **LATE
    ) as ending:
        fits, long = ending.send("wait", 3, "fits"), ending.send("wait_early", LONG)
        ending.noted("fits-started")
        ending.noted("early-started")
        ending.process.signal(TERM)
        assert ending.noted("fits-ended") == "returned"
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert fits.state == "SUCCESS"
        assert long.state == "FAILURE"


def test_where_sigterm_means_sigquit_no_task_is_to_be_retried_for_ever(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    conf = {"worker_soft_shutdown_timeout": 0, "remap": "SIGQUIT"}
    with worker(valkey.celery_url, valkey, "prefork", **conf) as ending:
        early = ending.send("wait_early", LONG)
        ending.noted("early-started")
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert early.state == "FAILURE"
        assert ending.noted("early-ended") == "SystemExit"


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_time_limits_hold_while_the_last_tasks_run(pool: str, valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    conf = LATE | {"worker_soft_shutdown_timeout": 20}
    with worker(valkey.celery_url, valkey, pool, "-c", "3", **conf) as ending:
        soft, hard = ending.send("soft"), ending.send("hard")
        last = ending.send("wait", 3, "last")
        eventually(lambda: {soft.state, hard.state, last.state} == {"STARTED"})
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert soft.get(timeout=1) == "in time"
        assert "TimeLimitExceeded" in repr(hard.result)
        assert last.state == "SUCCESS"
        assert leaves_nothing(ending)


@pytest.mark.parametrize(
    ("pool", "silent"), [("celeriac", True), ("prefork", True), ("prefork", False)]
)
def test_a_server_that_is_away_holds_up_no_end(
    pool: str, silent: bool, valkey: Valkey, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as away, worker(away.celery_url, away, pool, **LATE) as ending:
        ending.send("wait", LONG, "late")
        ending.noted("late-started")
        assert away.process is not None
        if silent:
            os.kill(away.process.pid, signal.SIGSTOP)
        else:
            away.stop()
        began = time.monotonic()
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
        assert time.monotonic() - began < GRACE + 8  # of a busy machine; it takes 2 s more
        if silent:
            os.kill(away.process.pid, signal.SIGCONT)


def test_a_signal_while_python_ends_is_not_the_end_of_the_worker(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    with worker(valkey.celery_url, valkey, "celeriac", slow_end="1") as ending:
        ending.process.signal(TERM)
        ending.process.wait_for("the last object")
        ending.process.signal(TERM)
        assert ending.process.wait() == 0
