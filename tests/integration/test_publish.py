"""Publishing from coroutines: Celery's own messages, on every broker."""

import asyncio
import base64
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery, chain, chord, group, shared_task, signals
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from kombu import serialization
from kombu.entity import Exchange, Queue
from kombu.exceptions import EncodeError
from redis import Redis

import celeriac
from celeriac import PublishError, adelay, asend_task, bridge, publish_many, use_app
from celeriac.embedded import Valkey
from celeriac.errors import PublishManyError
from celeriac.fastapi import attach
from celeriac.store import redis_url
from publishing import make_app, take, took_task_ids, turns
from support import (
    close_results,
    empty_redis,
    eventually,
    free_port,
    given,
    python,
    run_python,
    wanted,
)

BROKERS = ["embedded", *wanted("redis", "TEST_REDIS_URL"), *wanted("rabbitmq", "TEST_AMQP_URL")]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    if request.param == "rabbitmq":
        return given("TEST_AMQP_URL")
    url = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(url)
    return url


@pytest.fixture
def queue(broker: str) -> Iterator[str]:
    name = f"publish-{os.urandom(4).hex()}"
    yield name
    with Celery(broker=broker, set_as_current=False).connection() as connection:
        connection.default_channel.queue_delete(name)


@pytest.fixture
def app(broker: str, queue: str) -> Celery:
    return make_app(broker, task_default_queue=queue)


def test_a_coroutine_publishes_what_a_stock_worker_runs(
    broker: str, queue: str, valkey: Valkey
) -> None:
    backend = broker if broker.startswith("redis") else valkey.celery_url
    code = (
        "from celery import Celery\n"
        f"app = Celery('stock', broker={broker!r}, backend={backend!r})\n"
        f"app.conf.task_default_queue = {queue!r}\n"
        "@app.task(name='add')\n"
        "def add(x, y=0): return x + y\n"
        "@app.task(name='total')\n"
        "def total(numbers): return sum(numbers)\n"
        "app.worker_main(['worker', '-P', 'solo', '-l', 'info', '--without-gossip'])\n"
    )
    app = make_app(broker, backend, task_default_queue=queue)
    add, total = app.tasks["add"], app.signature("total")

    async def publish() -> list[Any]:
        return [
            await add.adelay(1, y=2),
            await adelay(add.s(3), 4),
            await asend_task(app, "add", (5, 6)),
            (await publish_many([add.s(7, 8)]))[0],
            await adelay(chain(add.s(1, 1), add.s(2))),
            await adelay(group(add.s(1, 1), add.s(2, 2))),
            await adelay(chord([add.s(1, 1), add.s(2, 2)], total)),
        ]

    with python("-c", code) as worker:
        worker.wait_for(r"ready\.$")
        results = asyncio.run(publish())
        got = [result.get(timeout=20) for result in results]
        assert got == [3, 7, 11, 15, 4, [2, 4], 6]
    close_results(app.backend)


IN_2030 = datetime(2030, 1, 1, tzinfo=UTC)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "priority": {"priority": 6},
    "routing key": {"routing_key": "elsewhere", "exchange": ""},
    "expires": {"expires": IN_2030},
    "eta": {"eta": IN_2030},
    "headers": {"headers": {"tenant": "x"}},
    "compression": {"compression": "zlib"},
    "serializer": {"serializer": "pickle"},
    "ignore_result": {"ignore_result": True},
    "limits": {"time_limit": 9, "soft_time_limit": 8},
    "shadow": {"shadow": "other"},
    "retry": {"retry": True, "retry_policy": {"max_retries": 5}},
}


def comparable(message: Any) -> Any:
    headers = {k: v for k, v in message.headers.items() if k not in ("id", "root_id")}
    properties = dict(message.properties)
    for name in ("correlation_id", "delivery_tag", "expiration"):
        properties.pop(name, None)
    delivery = {k: v for k, v in message.delivery_info.items() if k != "delivery_tag"}
    return (
        headers,
        properties,
        delivery.get("routing_key"),
        bytes(message.body) if isinstance(message.body, memoryview) else message.body,
        message.content_type,
        message.content_encoding,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_the_message_is_that_of_apply_async(app: Celery, name: str) -> None:
    options = {"task_id": "fixed"} | OPTIONS[name]
    if "routing_key" in options:
        options["routing_key"] = app.conf.task_default_queue
    add = app.tasks["add"]
    options["link"] = add.s(1)
    add.apply_async((1,), {"y": 2}, **options)
    asyncio.run(add.aapply_async((1,), {"y": 2}, **options))
    theirs, ours = (eventually(partial(take, app), 5) for _ in range(2))
    assert comparable(ours) == comparable(theirs)


@pytest.mark.parametrize("conf", [{}, {"global_keyprefix": "p:"}, {"priority_steps": [0, 5]}])
def test_the_bytes_in_redis_are_those_of_apply_async(valkey: Valkey, conf: dict[str, Any]) -> None:
    empty_redis(valkey.celery_url)
    app = make_app(valkey.celery_url, broker_transport_options=conf, task_queue_max_priority=9)
    add = app.tasks["add"]
    with Redis.from_url(redis_url(valkey.celery_url)) as client:

        def contents() -> dict[bytes, Any]:
            found: dict[bytes, Any] = {}
            for key in client.scan_iter():
                if client.type(key) == b"list":
                    message = json.loads(client.lindex(key, 0))
                    message["properties"].pop("delivery_tag")
                    found[key] = json.dumps(message)
                else:
                    found[key] = sorted(client.smembers(key))
            client.flushdb()
            return found

        for options in ({}, {"priority": 7}, {"queue": "other"}):
            add.apply_async((1, 2), task_id="fixed", **options)
            theirs = contents()
            asyncio.run(add.aapply_async((1, 2), task_id="fixed", **options))
            assert contents() == theirs


def test_a_sent_event_follows_its_message(redis_app: Celery) -> None:
    async def publish() -> list[Any]:
        return [await adelay(redis_app.tasks["add"], number) for number in range(2)]

    redis_app.conf.task_send_sent_event = True
    client = Redis.from_url(redis_url(redis_app.conf.broker_url))
    with client.pubsub() as events:  # type: ignore[no-untyped-call]
        events.psubscribe("*celeryev*")
        for result in asyncio.run(publish()):
            event = eventually(lambda: events.get_message(ignore_subscribe_messages=True), 5)
            body = base64.b64decode(json.loads(event["data"])["body"]).decode()
            assert result.id in json.dumps(body)
        events.connection_pool.disconnect()


@contextmanager
def publish_signals() -> Iterator[list[str]]:
    seen: list[str] = []

    def before(**_: Any) -> None:
        seen.append("before")

    def after(**_: Any) -> None:
        seen.append("after")

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        yield seen
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)


def test_after_task_publish_comes_after_the_message_is_there(app: Celery) -> None:
    with publish_signals() as seen:
        asyncio.run(adelay(app.tasks["add"], 1))
    assert seen == ["before", "after"]
    refused = make_app(f"redis://127.0.0.1:{free_port()}/0")
    with publish_signals() as seen, pytest.raises(PublishError):
        asyncio.run(adelay(refused.tasks["add"], 1))
    assert seen == ["before"]


def test_errors_of_the_programmer_stay_themselves(app: Celery) -> None:
    add = app.tasks["add"]
    app.conf.task_create_missing_queues = False

    async def publish() -> None:
        with pytest.raises(EncodeError):
            await add.adelay(object())
        with pytest.raises(TypeError):
            await add.adelay(1, 2, 3)
        with pytest.raises(celeriac.ConfigurationError, match="publish_timeout"):
            await add.aapply_async((1,), publish_timeout=0)
        result = await add.adelay(1)
        assert took_task_ids(app) == [result.id]

    asyncio.run(publish())


def test_many_messages_in_one_call_arrive_and_leave_turns_to_others(app: Celery) -> None:
    add = app.tasks["add"]
    begun_in_turn: Counter[int] = Counter()

    async def publish() -> list[str]:
        await add.adelay(0)  # the app makes what it needs with its first message
        with turns() as taken:

            def encode(body: Any) -> str:
                begun_in_turn[taken.count] += 1
                return json.dumps(body)

            serialization.register(  # type: ignore[no-untyped-call]
                "counted", encode, json.loads, "application/x-counted", "utf-8"
            )
            counted = (add.s(number).set(serializer="counted") for number in range(500))
            results = await publish_many(counted)
        return [result.id for result in results]

    try:
        ids = asyncio.run(publish())
    finally:
        serialization.unregister("counted")  # type: ignore[no-untyped-call]
    assert begun_in_turn.total() == 500
    assert max(begun_in_turn.values()) <= 64  # as many are on their way at once
    assert sorted(took_task_ids(app)[1:]) == sorted(ids)
    assert len(set(ids)) == 500


def test_many_messages_say_which_were_not_sent(redis_app: Celery) -> None:
    refused = make_app(f"redis://127.0.0.1:{free_port()}/0")

    async def publish() -> PublishManyError:
        good, bad = redis_app.tasks["add"].s(1), refused.tasks["add"].s(1)
        with pytest.raises(PublishManyError, match=r"were not sent") as failed:
            await publish_many([good] * 10 + [bad] + [good] * 100)
        return failed.value

    error = asyncio.run(publish())
    sent = [each.id for each in error.outcomes if not isinstance(each, PublishError)]
    assert isinstance(error.outcomes[10], PublishError)
    assert sorted(took_task_ids(redis_app)) == sorted(sent)
    assert 10 <= len(sent) < 110


def test_many_messages_with_one_that_cannot_be_written_raise_its_error(redis_app: Celery) -> None:
    add = redis_app.tasks["add"]
    with pytest.raises(EncodeError) as failed:
        asyncio.run(publish_many([add.s(1), add.s(object())]))
    assert "of 2 messages were sent" in failed.value.__notes__[0]


def test_one_loop_after_another_leaves_nothing_open(app: Celery) -> None:
    before = psutil.Process().num_fds()
    for number in range(20):
        asyncio.run(app.tasks["add"].adelay(number))
    assert len(took_task_ids(app)) == 20
    assert psutil.Process().num_fds() <= before + 6  # idle threads keep theirs for a while


def test_a_forked_child_publishes_on_its_own_connection(redis_app: Celery) -> None:
    add = redis_app.tasks["add"]

    async def publish() -> int:
        await add.adelay(1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                threading.Thread(target=lambda: asyncio.run(add.adelay(2))).start()
                for thread in threading.enumerate():
                    if thread is not threading.current_thread():
                        thread.join(5)
                code = 0
            finally:
                os._exit(code)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        await add.adelay(3)
        return status

    assert asyncio.run(publish()) == 0
    assert len(took_task_ids(redis_app)) == 3


def test_two_apps_in_one_process_each_publish_to_their_own_broker(
    redis_app: Celery, tmp_path: Path
) -> None:
    with Valkey(tmp_path) as second:
        other = make_app(second.celery_url)

        @shared_task(name="shared-by-two")
        def both() -> None: ...

        async def publish(app: Celery) -> None:
            with use_app(app):
                await asyncio.gather(*(adelay(both) for _ in range(5)))

        async def both_at_once() -> None:
            await asyncio.gather(publish(redis_app), publish(other))
            await asyncio.gather(
                *(asyncio.to_thread(asyncio.run, publish(app)) for app in (redis_app, other))
            )

        asyncio.run(both_at_once())
        assert len(took_task_ids(redis_app)) == 10
        assert len(took_task_ids(other)) == 10


@pytest.fixture
def eager() -> Celery:
    app = make_app("memory://", "cache+memory://", task_always_eager=True)

    @app.task(shared=False, name="pause")
    async def pause(name: str) -> str:
        await asyncio.sleep(0.05)
        return f"{name} on {id(asyncio.get_running_loop())}"

    return app


def test_an_eager_task_runs_on_the_callers_loop_without_blocking_it(eager: Celery) -> None:
    async def publish() -> None:
        began = time.perf_counter()
        results = await asyncio.gather(*(eager.tasks["pause"].adelay(str(n)) for n in range(10)))
        assert time.perf_counter() - began < 0.4
        here = id(asyncio.get_running_loop())
        assert [each.get() for each in results] == [f"{n} on {here}" for n in range(10)]
        assert (await adelay(chain(eager.tasks["add"].s(1, 2), eager.tasks["add"].s(3)))).get() == 6

    asyncio.run(publish())


def test_a_task_that_publishes_is_the_parent_of_what_it_sends(redis_app: Celery) -> None:
    add = redis_app.tasks["add"]

    @redis_app.task(shared=False)
    async def outer() -> str:
        return str((await adelay(add, 1)).id)

    @redis_app.task(shared=False)
    async def canvas() -> None:
        await adelay(group(add.s(1), add.s(2)))

    @redis_app.task(shared=False)
    def synchronous() -> None:
        asyncio.run(add.adelay(1))

    outer.apply(task_id="parent")
    synchronous.apply(task_id="parent")
    canvas.apply(task_id="parent", root_id="root")
    bridge.close()  # the process's loop, which keeps what its apps publish with
    for _ in range(4):
        headers = take(redis_app).headers
        assert (headers["parent_id"], headers["root_id"]) in {
            ("parent", "parent"),
            ("parent", "root"),
        }


def test_a_view_answers_503_when_the_broker_is_away() -> None:
    celery = make_app(f"redis://127.0.0.1:{free_port()}/0")
    web = FastAPI()
    attach(web, celery)

    @web.post("/")
    async def view(request: Request) -> str:  # FastAPI keeps views for ever, and their closures
        return str((await adelay(request.app.celery.tasks["add"], 1)).id)

    with TestClient(web) as client:
        answer = client.post("/")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_importing_the_package_loads_no_library() -> None:
    code = (
        "import sys, celeriac\n"
        "assert not {'fastapi', 'flask', 'sqlalchemy', 'redis', 'celery'} & set(sys.modules)\n"
        "assert len(celeriac.__all__) <= 15\n"
        "for name in celeriac.__all__: getattr(celeriac, name)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_settings_of_an_adopted_app_stay_its_own() -> None:
    class Source:
        broker_url = "memory://"
        task_default_priority = 3

    app = Celery(set_as_current=False)
    held = app.conf
    celeriac.adopt(app)
    app.config_from_object(Source)
    held.task_default_queue = "first"
    assert app.conf.task_default_queue == "first"
    app.conf.task_always_eager = True
    assert held.task_always_eager
    assert app.conf["CELERY_ALWAYS_EAGER"]  # the old name
    assert app.conf.task_default_priority == 3
    Source.task_default_priority = 4
    assert app.conf.task_default_priority == held.task_default_priority == 4
    app.conf.clear()
    assert not app.conf.task_always_eager
    assert app.conf.copy() == held.copy()
    with pytest.raises(AttributeError):
        _ = app.conf.no_such_setting
    with pytest.raises(KeyError):
        _ = app.conf["no_such_setting"]


@pytest.mark.parametrize("connected", [[], ["before"], ["after"]])
def test_what_celery_and_its_extensions_do_around_a_message_stays_so(
    redis_app: Celery, connected: list[str]
) -> None:
    seen: list[str] = []

    def note(**_: Any) -> None:
        seen.append(f"signal with {len(took_task_ids(redis_app))} there")

    class Retold(redis_app.Task):  # type: ignore[misc]
        def apply_async(self, *args: Any, **options: Any) -> Any:
            result = super().apply_async(*args, **options)
            seen.append(f"task with {len(took_task_ids(redis_app))} there")
            return result

    @redis_app.task(base=Retold, shared=False)
    def retold() -> None: ...

    listening = {"before": signals.before_task_publish, "after": signals.after_task_publish}

    async def publish() -> None:
        await redis_app.tasks["add"].adelay(1)
        await retold.adelay()
        seen.clear()
        took_task_ids(redis_app)
        for name in connected:
            listening[name].connect(note)
        await redis_app.tasks["add"].adelay(1)
        for name in connected:
            listening[name].disconnect(note)
        took_task_ids(redis_app)
        await retold.adelay()
        await publish_many([retold.s()])

    asyncio.run(publish())
    noted = {"before": ["signal with 0 there"], "after": ["signal with 1 there"]}
    expected = [line for name in connected for line in noted[name]]
    assert seen == [*expected, *["task with 1 there"] * 2]


def test_a_message_that_goes_through_an_exchange_reaches_its_queues(redis_app: Celery) -> None:
    exchange = Exchange("news", type="topic")  # type: ignore[no-untyped-call]
    name = redis_app.conf.task_default_queue
    queue = Queue(name, exchange, routing_key="news.#")  # type: ignore[no-untyped-call]
    redis_app.conf.task_queues = [queue]
    add = redis_app.tasks["add"]

    async def publish() -> list[str]:
        options = {"exchange": "news", "routing_key": "news.sport"}
        results = [await add.aapply_async((number,), **options) for number in range(3)]
        results += await publish_many([add.s(number).set(**options) for number in range(20)])
        return [result.id for result in results]

    assert sorted(asyncio.run(publish())) == sorted(took_task_ids(redis_app))
