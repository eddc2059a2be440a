"""Every run of a task comes to an end that can be read, whatever becomes of its worker."""

import json
import signal
import time
from urllib.parse import urlsplit

import pytest
from celery import chord
from celery.exceptions import WorkerLostError
from redis import Redis

from celeriac.embedded import Valkey
from celeriac.store import redis_url
from chaos.proxy import Proxy
from support import empty_redis, eventually, given
from workers import BROKERS, Worker

LEASE = 2.0  # seconds
LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1}


def worker(broker: str, valkey: Valkey, pool: str, *options: str, **conf: object) -> Worker:
    conf = {"task_track_started": True, **conf}
    urls = broker, valkey.celery_url
    return Worker("pool_app", pool, *urls, *options, CONF=json.dumps(conf), LEASE=str(LEASE))


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    empty_redis(valkey.celery_url)
    if request.param == "redis":
        empty_redis(given("TEST_REDIS_URL"))
    urls = {"rabbitmq": "TEST_AMQP_URL", "redis": "TEST_REDIS_URL"}
    return given(urls[request.param]) if request.param in urls else valkey.celery_url


@pytest.fixture(params=["celeriac", "prefork", "threads", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_what_a_killed_worker_had_acknowledged_ends_as_a_failure(
    pool: str, broker: str, valkey: Valkey
) -> None:
    with worker(broker, valkey, pool) as first, worker(broker, valkey, pool) as second:
        sent = first.signature("wait_early", 60).on_error(second.signature("failed")).apply_async()
        group = chord(
            [first.signature("wait_early", 60)], second.signature("wait", 0)
        ).apply_async()
        for _ in range(1 if pool == "solo" else 2):
            first.noted("early-started")
        first.process.signal(signal.SIGKILL)
        with pytest.raises(WorkerLostError):
            sent.get(timeout=LEASE + 8)
        assert "WorkerLostError" in second.noted("errback")
        if pool != "solo":
            with pytest.raises(Exception, match="gone"):
                group.get(timeout=LEASE + 8)
        eventually(lambda: not second.notes.exists("celeriac:runs"))


def test_an_early_acknowledgement_that_was_lost_lets_nothing_begin_a_second_time(
    pool: str, valkey: Valkey
) -> None:
    empty_redis(valkey.celery_url)
    with worker(valkey.celery_url, valkey, pool) as first:
        sent = first.signature("wait_early", 0).apply_async(queue="held")
        raw = first.notes.rpop("held")
        assert isinstance(raw, bytes)
        message = json.loads(raw)
        first.notes.lpush(first.queue, json.dumps(message))
        assert sent.get(timeout=20) == "waited"
        message["properties"]["delivery_info"]["redelivered"] = True
        first.notes.lpush(first.queue, json.dumps(message))
        first.process.wait_for("has ended since it came again", 20)
        assert first.notes.llen("note:early-started") == 1


def test_what_a_killed_worker_had_not_acknowledged_waits_again_and_runs(
    pool: str, broker: str, valkey: Valkey
) -> None:
    with worker(broker, valkey, pool, **LATE) as first:
        sent = first.send("wait", 3)
        first.noted("wait-started")
        eventually(lambda: sent.state == "STARTED")
        first.process.signal(signal.SIGKILL)
        first.process.wait()
        with worker(broker, valkey, pool, "-Q", "none", **LATE) as second:
            eventually(lambda: sent.state == "PENDING", LEASE + 8)
            second.control("add_consumer", queue=first.queue)
            assert sent.get(timeout=LEASE + 15) == "waited"
            eventually(lambda: not second.notes.exists("celeriac:runs"))


def test_a_worker_that_was_given_up_and_lives_on_ends_what_it_runs(
    pool: str, broker: str, valkey: Valkey
) -> None:
    """Nobody else has begun it meanwhile: its end counts, and it does not run again."""
    with (
        worker(broker, valkey, pool, **LATE) as first,
        worker(broker, valkey, pool, "-Q", "none", **LATE) as second,
    ):
        second.wait_until_ready()
        sent = first.send("wait", 3)
        first.noted("wait-started")
        eventually(lambda: sent.state == "STARTED")
        first.process.signal(signal.SIGSTOP)
        second.process.wait_for("lost its process and waits again", LEASE + 8)
        assert sent.state == "PENDING"
        first.process.signal(signal.SIGCONT)
        assert sent.get(timeout=20) == "waited"
        eventually(lambda: not second.notes.exists("celeriac:runs"))
        assert first.notes.llen("note:wait-started") == 0


def test_a_task_that_kills_its_worker_is_started_three_times_and_costs_no_other(
    pool: str, broker: str, valkey: Valkey
) -> None:
    with worker(broker, valkey, pool, **LATE) as first:
        good = [first.send("wait", 0.1, "good") for _ in range(20)]
        poison = first.send("die")
        good += [first.send("wait", 0.1, "good") for _ in range(20)]
        replaced: list[Worker] = []
        try:
            while not poison.ready():
                if not first.process.running and not any(r.process.running for r in replaced):
                    new = worker(broker, valkey, pool, "-Q", first.queue, **LATE)
                    replaced.append(new)
                    new.wait_until_ready()
                eventually(
                    lambda: poison.ready() or not (replaced or [first])[-1].process.running, 60
                )
            with pytest.raises(Exception, match="3 times"):
                poison.get()
            assert {each.get(timeout=30) for each in good} == {"waited"}
            assert first.notes.llen("note:die-started") == 3
            with Redis.from_url(redis_url(_of_letters(broker, valkey))) as kept:
                assert kept.hlen("celeriac:dead") == 1
            eventually(lambda: not first.notes.exists("unacked"))
        finally:
            for each in replaced:
                each.close()


def test_suspects_have_their_turn_though_one_before_them_is_none_any_more(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    with worker(valkey.celery_url, valkey, "celeriac", **LATE) as first:
        sent = [
            first.signature("wait", seconds, "suspect").apply_async(queue="held")
            for seconds in (2, 0, 0)
        ]
        began = json.dumps({"n": 1, "w": "", "k": "", "t": int(time.time())})
        for each in sent:
            first.notes.hset("celeriac:runs", f"{each.id}:0:0", began)
            raw = first.notes.rpop("held")
            assert isinstance(raw, bytes)
            message = json.loads(raw)
            message["properties"]["delivery_info"]["redelivered"] = True
            first.notes.lpush(first.queue, json.dumps(message))
        first.noted("suspect-started")
        eventually(lambda: not first.notes.llen(first.queue))
        first.notes.hdel("celeriac:runs", f"{sent[1].id}:0:0")
        assert [each.get(timeout=20) for each in sent] == ["waited"] * 3


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_what_runs_while_its_connection_breaks_does_not_run_again(
    pool: str, valkey: Valkey
) -> None:
    empty_redis(valkey.celery_url)
    url = urlsplit(given("TEST_AMQP_URL"))
    with Proxy(url.port or 5672) as proxy:
        through = f"amqp://{url.username}:{url.password}@127.0.0.1:{proxy.port}{url.path}"
        with worker(through, valkey, pool, **LATE) as running:
            sent = running.send("wait", 5, "cut")
            running.noted("cut-started")
            proxy.reset()
            running.process.wait_for("Connection to broker lost")
            assert sent.get(timeout=30) == "waited"
            running.process.wait_for("has ended since it came again", 10)
            assert running.send("wait", 0, "cut").get(timeout=20) == "waited"
            assert running.notes.llen("note:cut-started") == 1


def _of_letters(broker: str, valkey: Valkey) -> str:
    return valkey.celery_url if broker.startswith("amqp") else broker


def test_what_kills_its_pools_process_is_not_waited_for_by_other_workers(
    broker: str, valkey: Valkey
) -> None:
    conf = {**LATE, "worker_concurrency": 1}
    with (
        worker(broker, valkey, "prefork", **conf) as first,
        worker(broker, valkey, "prefork", "-Q", first.queue, **conf),
    ):
        with pytest.raises(Exception, match="3 times"):
            first.send("die").get(timeout=40)
        assert first.notes.llen("note:die-started") == 3
        eventually(lambda: not first.notes.exists("celeriac:runs"))
