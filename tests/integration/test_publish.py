"""Publishing from coroutines: Celery's own messages, on every broker, and what goes wrong."""

import asyncio
import base64
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery, chain, chord, group, shared_task, signals
from fastapi import FastAPI
from fastapi.testclient import TestClient
from kombu.exceptions import EncodeError
from redis import Redis
from redis.asyncio.connection import AbstractConnection

import celeriac
from celeriac import PublishError, adelay, adopt, asend_task, publish_many, threads, use_app
from celeriac.embedded import Valkey
from celeriac.errors import PublishManyError
from celeriac.fastapi import attach
from celeriac.pipeline import Pipeline
from celeriac.publish import aapply_async
from celeriac.store import redis_url, status_connection
from support import empty_redis, eventually, free_port, given, python, run_python, wanted

BROKERS = ["embedded", *wanted("redis", "TEST_REDIS_URL"), *wanted("rabbitmq", "TEST_AMQP_URL")]
SLACK = 0.5  # seconds after a deadline in which a loaded machine still answers


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_idle_thread() -> Iterator[None]:
    yield
    threads.close()


def make_app(broker: str, backend: str = "disabled://", **options: Any) -> Celery:
    app = Celery("publish", broker=broker, backend=backend, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    app.conf.update(options)
    adopt(app)

    @app.task(shared=False, name="add")
    def add(x: int, y: int = 0) -> int:
        return x + y

    return app


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


@pytest.fixture
def redis_app(valkey: Valkey) -> Celery:
    empty_redis(valkey.celery_url)
    return make_app(valkey.celery_url)


def take(app: Celery, queue: str | None = None) -> Any:
    """The next message in the queue, as a consumer gets it; None if there is none."""
    with app.connection() as connection:
        channel = connection.default_channel
        message = channel.basic_get(queue or app.conf.task_default_queue, no_ack=True)
        return message and channel.message_to_python(message)


def took_task_ids(app: Celery) -> list[str]:
    ids = []
    while (message := take(app)) is not None:
        ids.append(message.headers["id"])
    return ids


@contextmanager
def lags() -> Iterator[list[float]]:
    """How late each tick of the loop comes, in seconds."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due)

    ticker = asyncio.create_task(tick())
    try:
        yield late
    finally:
        ticker.cancel()


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
    app.backend.result_consumer.stop()
    app.backend.client.close()


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
    redis_app.conf.task_send_sent_event = True
    client = Redis.from_url(redis_url(redis_app.conf.broker_url))
    with client.pubsub() as events:  # type: ignore[no-untyped-call]
        events.psubscribe("*celeryev*")
        result = asyncio.run(adelay(redis_app.tasks["add"], 1))
        event = eventually(lambda: events.get_message(ignore_subscribe_messages=True), 5)
        assert result.id in json.dumps(base64.b64decode(json.loads(event["data"])["body"]).decode())
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


# Broken brokers


class Silent:
    """A port that accepts and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def fails_within(timeout: float, *, lag: float = 0.15) -> AsyncIterator[None]:
    began = time.perf_counter()
    with lags() as late, pytest.raises(PublishError):
        yield
    assert time.perf_counter() - began < timeout + SLACK
    assert not late or max(late) < lag


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_refused_connection_is_a_publish_error_at_once(scheme: str) -> None:
    app = make_app(f"{scheme}://127.0.0.1:{free_port()}/0")

    async def publish() -> None:
        async with fails_within(0.5):
            await app.tasks["add"].adelay(1)
        async with fails_within(0.5):
            await adelay(group(app.tasks["add"].s(1), app.tasks["add"].s(2)))
        async with fails_within(0.5):
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
        with lags() as late:
            done = await asyncio.gather(
                *(add.adelay(number) for number in range(200)), return_exceptions=True
            )
        assert time.perf_counter() - began < 0.4 + SLACK
        assert {type(each) for each in done} == {PublishError}
        assert not any(each.maybe_accepted for each in done if isinstance(each, PublishError))
        assert max(late) < 0.3
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
        assert names.count("celeriac-publish") == 1  # the paused connection has gone
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


def test_many_messages_in_one_call_arrive_in_any_case(app: Celery) -> None:
    add = app.tasks["add"]

    async def publish() -> list[str]:
        await add.adelay(0)  # the app makes what it needs with its first message
        with lags() as late:
            results = await publish_many(add.s(number) for number in range(500))
        assert max(late) < 0.15
        return [result.id for result in results]

    ids = asyncio.run(publish())
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
    async def view() -> str:
        return str((await adelay(celery.tasks["add"], 1)).id)

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
