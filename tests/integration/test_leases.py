"""What a worker holds is its own while it lives, however long, and back within the lease if not."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from celeriac.embedded import Valkey
from chaos.proxy import Proxy
from chaos.servers import RedisServer
from support import empty_redis, eventually, python
from workers import Worker

LATE = json.dumps({"task_acks_late": True, "worker_prefetch_multiplier": 4})
STOCK = json.dumps(json.loads(LATE) | {"broker_transport": "kombu.transport.redis:Transport"})
LEASE = 2.0  # seconds


def worker(valkey: Valkey, pool: str, *options: str, conf: str = LATE) -> Worker:
    urls = valkey.celery_url, valkey.celery_url
    return Worker("pool_app", pool, *urls, *options, CONF=conf, LEASE=str(LEASE))


@pytest.fixture(autouse=True)
def _empty(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)


@pytest.mark.parametrize("pool", ["celeriac", "prefork", "threads", "solo"])
def test_what_a_killed_worker_held_runs_elsewhere_within_the_lease(
    pool: str, valkey: Valkey
) -> None:
    with worker(valkey, pool) as first, worker(valkey, pool, "-Q", "idle") as second:
        sent = [first.send("wait", 1, "held") for _ in range(12)]
        first.noted("held-started")
        first.process.signal(signal.SIGKILL)
        second.control("add_consumer", queue=first.queue)
        held = f"celeriac:unacked:held:{first.process.pid}-*"
        assert list(first.notes.scan_iter(held))
        eventually(lambda: not list(first.notes.scan_iter(held)), LEASE + 5)
        assert {result.get(timeout=40) for result in sent} == {"waited"}


def test_a_task_of_three_leases_and_what_is_due_later_run_once(valkey: Valkey) -> None:
    with (
        worker(valkey, "celeriac") as first,
        worker(valkey, "celeriac", "-Q", first.queue) as second,
        worker(valkey, "prefork", "-Q", first.queue),
    ):
        long = [first.send("wait", 3 * LEASE, "long") for _ in range(6)]
        later = [first.send("wait", 0, "later", countdown=4 * LEASE) for _ in range(6)]
        assert {each.get(timeout=60) for each in (*long, *later)} == {"waited"}
        assert second.notes.llen("note:long-started") == 6
        assert second.notes.llen("note:later-started") == 6
        eventually(lambda: not second.notes.exists("unacked"))


def test_what_a_stock_worker_runs_is_left_to_it(valkey: Valkey) -> None:
    with (
        worker(valkey, "threads", conf=STOCK) as stock,
        worker(valkey, "celeriac", "-Q", "nothing"),
    ):
        sent = stock.send("wait", 3 * LEASE, "stock")
        assert stock.noted("stock-started")
        assert sent.get(timeout=30) == "waited"
        assert stock.notes.llen("note:stock-started") == 0  # a second one


def test_a_worker_that_ends_gives_back_at_once_what_it_had_not_begun(valkey: Valkey) -> None:
    with worker(valkey, "celeriac", "-c", "1") as first:
        for _ in range(4):
            first.send("wait", 1, "given")
        first.noted("given-started")
        eventually(lambda: first.notes.hlen("unacked") == 4)
        first.process.signal(signal.SIGTERM)
        assert first.process.wait() == 0
        assert first.notes.llen(first.queue) == 3
        assert not any(first.notes.scan_iter("celeriac:*held*"))
        assert not first.notes.exists("unacked")


def test_a_worker_that_lost_its_lease_keeps_nothing_that_others_have(valkey: Valkey) -> None:
    with worker(valkey, "celeriac") as first:
        held: list[Any] = [first.send("wait", 4, "slow") for _ in range(3)]
        for _ in held:
            first.noted("slow-started")
        with worker(valkey, "celeriac", "-Q", first.queue):
            first.process.signal(signal.SIGSTOP)
            first.noted("slow-started", LEASE + 10)  # one by one: they are suspects
            first.process.signal(signal.SIGCONT)
            assert {each.get(timeout=40) for each in held} == {"waited"}
            eventually(lambda: not first.notes.exists("unacked"), 30)
        again = first.send("wait", 0, "after")
        assert again.get(timeout=20) == "waited"


def test_what_was_taken_in_a_step_whose_reply_was_lost_is_queued_again(valkey: Valkey) -> None:
    with worker(valkey, "celeriac") as first:
        first.send("wait", 0).get(timeout=20)
        holder: Any = first.notes.zrange("celeriac:unacked:leases", 0, -1)[0]
        message = '{"properties": {"delivery_info": {"exchange": "", "routing_key": ""}}}'
        with first.notes.pipeline() as pipe:  # as the script leaves it
            pipe.hset(f"celeriac:unacked:held:{holder.decode()}", "stray", "elsewhere")
            pipe.hset("unacked", "stray", f'[{message}, "", ""]')
            pipe.zadd("unacked_index", {"stray": 1e12})
            pipe.execute()
        assert first.send("wait", 0).get(timeout=20) == "waited"
        eventually(lambda: first.notes.llen("elsewhere") == 1, 15)
        eventually(lambda: not first.notes.exists("unacked"))


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_what_waits_when_the_network_fails_is_given_back_over_the_next_connection(
    pool: str, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server, Proxy(server.port) as network:
        through = server.url_at(network.port)
        limits = {"socket_timeout": 2, "socket_connect_timeout": 2}
        conf = json.dumps(json.loads(LATE) | {"broker_transport_options": limits})
        with Worker("pool_app", pool, through, server.url, CONF=conf, LEASE=str(LEASE)) as running:
            sent = running.send("wait", 0, countdown=3)
            running.process.wait_for(rf"\[{sent.id}\] received")
            network.refuse()
            running.process.wait_for("Trying again")
            network.heal()
            assert sent.get(timeout=20) == "waited"


def test_a_worker_that_looked_for_its_broker_first_holds_a_lease_too(valkey: Valkey) -> None:
    url, name = valkey.celery_url, "made"
    made = f"""
import celeriac
celery = celeriac.create_celery(
    celeriac.Settings(celery_broker_url={url!r}, celery_result_backend={url!r}), name={name!r}
)
@celery.task
def add(x, y):
    return x + y
"""
    with (
        Redis.from_url(valkey.redis_url) as client,
        python(
            "-c", f"{made}\ncelery.worker_main(['worker', '-P', 'solo', '-l', 'info'])"
        ) as running,
    ):
        running.wait_for("ready")
        assert eventually(lambda: client.zcard("celeriac:unacked:leases")) == 1
