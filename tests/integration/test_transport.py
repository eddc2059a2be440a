"""kombu's Redis transport, with fewer round trips: nothing lost, nothing taken beyond the limit."""

import json
from pathlib import Path

import pytest
from celery import Celery
from kombu.transport.redis import Transport as KombuTransport
from redis import Redis

from celeriac import adopt
from celeriac.embedded import Valkey
from celeriac.transport import Transport
from support import empty_redis, eventually
from workers import POOLS, Worker

LATE = {"task_acks_late": True, "worker_prefetch_multiplier": 1}


@pytest.fixture(params=list(POOLS))
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_messages_of_all_queues_and_priorities_arrive_once_each(pool: str, valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    worker = Worker("pool_app", pool, *urls, CONF=json.dumps(LATE))
    try:
        sent = [worker.send("wait", 0, "any", priority=number % 10) for number in range(300)]
        worker.wait_until_ready()
        assert {result.get(timeout=60) for result in sent} == {"waited"}
        eventually(lambda: not worker.notes.exists("unacked", "unacked_index", worker.queue))
        assert worker.notes.llen("note:any-ended") == 300
    finally:
        worker.close()


def test_no_more_is_taken_than_the_prefetch_limit(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    conf = json.dumps(LATE | {"worker_prefetch_multiplier": 2})
    worker = Worker("pool_app", "celeriac", *urls, "-c", "3", CONF=conf)
    try:
        for _ in range(20):
            worker.send("wait", 1.5, "held")
        worker.wait_until_ready()
        for _ in range(3):
            worker.noted("held-started")
        assert worker.notes.hlen("unacked") == 6
        assert worker.notes.llen(worker.queue) == 14
        worker.noted("held-ended")
        assert worker.notes.hlen("unacked") <= 6
    finally:
        worker.close()


def test_what_is_no_message_is_put_aside_and_costs_no_other(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    worker = Worker("pool_app", "celeriac", *urls, CONF=json.dumps(LATE))
    try:
        first = worker.send("wait", 0)
        broken = [b'{"body": "tru', b"\x80\x04pickled", b"[1, 2]", b'"text"', b"null"]
        for each in broken:
            worker.notes.lpush(worker.queue, each)
        last = worker.send("wait", 0)
        worker.wait_until_ready()
        assert [first.get(timeout=20), last.get(timeout=20)] == ["waited"] * 2
        assert sorted(worker.notes.hvals("celeriac:dead:raw")) == sorted(broken)
        assert len(worker.notes.hvals("celeriac:dead")) == len(broken)
    finally:
        worker.close()


def test_a_full_server_loses_no_message(tmp_path: Path) -> None:
    with Valkey(tmp_path) as broker, Redis.from_url(broker.redis_url) as client:
        app = adopt(Celery("full", broker=broker.celery_url, set_as_current=False))
        app.conf.broker_pool_limit = 0
        for _ in range(10):
            app.send_task("any", queue="full")
        arrived: list[object] = []
        with app.connection_for_read() as connection:
            channel = connection.channel()
            channel.exchanges = True
            channel.basic_consume("full", False, arrived.append, "tag")
            client.config_set("maxmemory", 1)
            assert not channel.exchange()
            assert (client.llen("full"), client.hlen("unacked"), arrived) == (10, 0, [])
            assert not channel.qos.can_consume()  # for a while, nor does BRPOP take one
            client.config_set("maxmemory", 0)
            channel.refused_until = 0.0
            assert channel.exchange()
            assert (client.llen("full"), client.hlen("unacked"), len(arrived)) == (0, 10, 10)


def test_a_stock_worker_and_ours_share_a_queue(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    stock = json.dumps(LATE | {"broker_transport": "kombu.transport.redis:Transport"})
    with (
        Worker("pool_app", "threads", *urls, CONF=stock) as theirs,
        Worker("pool_app", "celeriac", *urls, "-Q", theirs.queue, CONF=json.dumps(LATE)),
    ):
        sent = [theirs.send("wait", 0.05, "shared") for _ in range(200)]
        assert {result.get(timeout=60) for result in sent} == {"waited"}
        eventually(lambda: not theirs.notes.exists("unacked"))
        assert theirs.notes.llen("note:shared-ended") == 200


def test_a_global_prefix_holds_for_every_key(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    options = {"global_keyprefix": "mine:"}
    conf = json.dumps(LATE | {"broker_transport_options": options})
    worker = Worker("pool_app", "celeriac", *urls, CONF=conf)
    try:
        worker.client.conf.broker_transport_options = options
        sent = [worker.send("wait", 0.5, "prefixed") for _ in range(20)]
        worker.wait_until_ready()
        worker.noted("prefixed-started")
        assert worker.notes.exists("mine:unacked")
        assert {result.get(timeout=60) for result in sent} == {"waited"}
        assert not worker.notes.exists("unacked")
    finally:
        worker.close()


def test_what_a_worker_acknowledges_is_not_written_by_whoever_sends(valkey: Valkey) -> None:
    app = adopt(Celery("sender", broker=valkey.celery_url, set_as_current=False))
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        holdings = channel.holdings
        holdings.acknowledged.append("the main loop's")
    assert list(holdings.acknowledged) == ["the main loop's"]
    holdings.acknowledged.clear()


def test_kombus_own_transport_can_be_chosen(valkey: Valkey) -> None:
    app = adopt(Celery("chosen", broker=valkey.celery_url, set_as_current=False))
    with app.connection_for_read() as connection:
        assert isinstance(connection.transport, Transport)
    app.conf.broker_url = "redis://127.0.0.1:1/0"
    app.conf.broker_transport = "kombu.transport.redis:Transport"
    transport = app.connection_for_read().get_transport_cls()
    assert transport is KombuTransport


def test_a_queue_that_is_given_up_says_no_more(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", "celeriac", *urls) as worker:
        assert worker.send("wait", 0, "before").get(timeout=10) == "waited"
        for _ in range(3):
            worker.control("cancel_consumer", queue=worker.queue)
            late = worker.send("wait", 0, "after")  # which Redis tells whoever had looked
            assert worker.control("ping") == {"ok": "pong"}
            assert worker.notes.llen(worker.queue) == 1
            worker.control("add_consumer", queue=worker.queue)
            assert late.get(timeout=10) == "waited"
        assert "Connection to broker lost" not in worker.process.output
