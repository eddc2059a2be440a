"""The profile on a real RabbitMQ: quorum queues, delays, dead letters, confirms, refusals."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from amqp.exceptions import NotFound, PreconditionFailed
from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from celeriac import PublishError, adelay, asend_task, profile, rabbitmq
from celeriac.embedded import Valkey
from celeriac.publish import aapply_async
from chaos.proxy import Proxy
from profiles import Profiled
from support import empty_redis, eventually, given

Make = Callable[..., Profiled]


@pytest.fixture
def make(valkey: Valkey) -> Iterator[Make]:
    """Apps on RabbitMQ, whose queues are deleted at the end."""
    broker = given("TEST_AMQP_URL")
    empty_redis(valkey.celery_url)
    with ExitStack() as stack:

        def made(**options: Any) -> Profiled:
            client = Profiled(broker, valkey.celery_url, **options)
            stack.callback(client.close)
            stack.callback(delete, client)
            return client

        yield made


def delete(client: Profiled) -> None:
    with client.app.connection_for_write() as connection:
        for queue in client.app.amqp.queues:
            connection.default_channel.queue_delete(queue)


def declare(client: Profiled, queue: Queue) -> None:
    with client.app.connection_for_write() as connection:
        queue(connection.default_channel).declare()  # type: ignore[no-untyped-call]


def count(client: Profiled, queue: str) -> int:
    with client.app.connection_for_read() as connection:
        asked = connection.default_channel.queue_declare(queue, passive=True)
        found: int = asked.message_count
        return found


def dead_letter(client: Profiled, task_id: str) -> Any:
    """Taken from the dead letters, where those of others stay."""

    def found() -> Any:
        with client.app.connection_for_read() as connection:
            channel = connection.default_channel
            while (message := channel.basic_get(rabbitmq.DEAD)) is not None:
                if message.headers.get("id") == task_id:
                    channel.basic_ack(message.delivery_tag)
                    return message
        return None

    return eventually(found, 20, f"{task_id} among the dead letters")


def test_queues_are_declared_with_a_limit_of_deliveries_and_a_place_for_dead_letters(
    make: Make,
) -> None:
    client = make()
    with client.worker("-P", "solo"):
        assert client.send("note", "one").get(timeout=20)
        reply = client.app.control.ping(timeout=5)  # its queues are no quorum queues
        assert any(client.queue in node for each in reply for node in each)
        declare(client, rabbitmq.queue(client.queue))  # RabbitMQ compares every argument
        declare(client, rabbitmq.dead_queue())
        with pytest.raises(PreconditionFailed, match=r"x-queue-type|x-dead-letter"):
            declare(client, Queue(client.queue))  # type: ignore[no-untyped-call]


def test_delayed_tasks_run_at_their_time_and_hold_up_no_other(make: Make) -> None:
    client = make()
    client.options["task_queues"] = [client.queue, f"dotted.{client.queue}"]
    client.app.conf.task_queues = [rabbitmq.queue(each) for each in client.options["task_queues"]]
    began = time.time()
    client.send("note", "early", countdown=2)  # before there is any worker
    with client.worker("-P", "threads", "-c", "2"):
        for _ in range(20):
            client.send("note", "later", countdown=3600)
        began_now, half = time.time(), timedelta(seconds=0.5)
        due = {"half": 0.5, "eta": 0.5, "one": 1.0, "three": 3.0, "dotted": 1.0}
        client.send("note", "half", countdown=due["half"])
        client.send("note", "eta", eta=client.app.now() + half)
        client.send("note", "one", countdown=due["one"])
        client.send("note", "three", countdown=due["three"])
        client.send("note", "dotted", countdown=due["dotted"], queue=f"dotted.{client.queue}")
        assert client.send("note", "now").get(timeout=10) < began_now + 10
        for key, seconds in due.items():
            (ran,) = client.noted(key, 1)
            assert began_now + seconds <= ran < began_now + seconds + 5, key
        (ran,) = client.noted("early", 1)
        assert began + 2 <= ran
        client.send("note", "last", countdown=1).get(timeout=10)
        # Each once, though the key of one queue is the end of the other's name.
        assert [client.notes.llen(f"note:{key}") for key in due] == [1] * len(due)
        assert not client.notes.exists("note:later")


def test_a_coroutine_sends_delayed_tasks_before_there_is_a_worker(make: Make) -> None:
    client = make()
    note = client.app.signature("profile_app.note", ("async",), countdown=1)

    async def send() -> None:
        await asend_task(client.app, "profile_app.note", ("short",), countdown=0.2)
        await adelay(note)

    asyncio.run(send())
    with client.worker("-P", "solo"):
        client.noted("async", 1)
        client.noted("short", 1)


def test_retries_with_any_delay_come_back(make: Make) -> None:
    client = make()
    with client.worker("-P", "solo"):
        client.send("again", "often", [1, 0, 2, 0.3, 1.5], countdown=1).get(timeout=30)
        runs = client.noted("often", 6)
        pauses = [after - before for before, after in pairwise(runs)]
        assert len(pauses) == 5
        for pause, least in zip(pauses, [1, 0, 2, 0.3, 1.5], strict=True):
            # Celery delays by whole seconds; the worker holds what is left of the time.
            assert least <= pause < least + 5


def test_a_message_that_reaches_the_limit_of_deliveries_is_a_dead_letter(make: Make) -> None:
    client = make()
    with client.worker("-P", "solo"):
        pass  # which has declared everything
    sent = client.send("note", "never")
    with client.app.connection_for_read() as connection:
        channel = connection.default_channel
        for _ in range(rabbitmq.DELIVERIES + 1):
            message = eventually(lambda: channel.basic_get(client.queue))
            channel.basic_reject(message.delivery_tag, requeue=True)
    message = dead_letter(client, sent.id)
    (death,) = message.headers["x-death"]
    assert (death["reason"], death["queue"]) == ("delivery_limit", client.queue)
    assert count(client, client.queue) == 0


def test_an_expired_message_is_a_dead_letter_too(make: Make) -> None:
    client = make()
    with client.worker("-P", "solo"):
        pass
    sent = client.send("note", "never", expires=0.2)
    (death,) = dead_letter(client, sent.id).headers["x-death"]
    assert death["reason"] == "expired"


def test_priorities_are_kept_by_the_classic_queues_that_have_them(make: Make) -> None:
    client = make(task_queue_max_priority=9, worker_concurrency=1)
    for priority in (0, 5, 9):
        client.send("note", "priority", priority=priority).forget()
    order = [client.send("note", f"p{priority}", priority=priority) for priority in (1, 3, 8)]
    with client.worker("-P", "solo"):
        low, middle, high = [result.get(timeout=20) for result in order]
        assert high < middle < low


@pytest.mark.parametrize("sends", ["delay", "adelay"])
def test_a_message_that_rabbitmq_does_not_take_is_an_error(make: Make, sends: str) -> None:
    client = make()
    exchange = Exchange(client.queue)  # type: ignore[no-untyped-call]
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = Queue(client.queue, exchange, client.queue, queue_arguments=full)  # type: ignore[no-untyped-call]
    client.app.conf.task_queues = [queue]
    client.app.amqp.__dict__.pop("queues", None)
    send(client.app, sends)
    with pytest.raises((PublishError, OperationalError)):
        send(client.app, sends)
    assert count(client, client.queue) == 1


@pytest.mark.parametrize("sends", ["delay", "adelay"])
def test_a_message_to_nowhere_is_an_error(make: Make, sends: str) -> None:
    client = make()
    with pytest.raises((PublishError, NotFound), match="no exchange"):
        send(client.app, sends, exchange="celeriac-nowhere", routing_key="any")
    send(client.app, sends)
    assert count(client, client.queue) == 1


def send(app: Celery, sends: str, **options: Any) -> None:
    signature = app.signature("profile_app.note", ("any",))
    if sends == "delay":
        signature.apply_async(**options)
    else:
        asyncio.run(aapply_async(signature, **options))


def test_a_confirmation_that_never_comes_is_not_waited_for_for_ever(valkey: Valkey) -> None:
    url = urlsplit(given("TEST_AMQP_URL"))
    with Proxy(url.port or 5672) as proxy:
        through = f"amqp://{url.username}:{url.password}@127.0.0.1:{proxy.port}{url.path}"
        client = Profiled(through, valkey.celery_url)
        client.app.conf.broker_pool_limit = 1
        try:
            client.send("note", "one")
            proxy.swallow()
            began = time.monotonic()
            with pytest.raises(OperationalError):
                client.send("note", "two")
            assert time.monotonic() - began < 4 * profile.SILENCE
            proxy.heal()
            client.send("note", "three")
            assert count(client, client.queue) == 2
        finally:
            proxy.heal()
            delete(client)
            client.app.pool.force_close_all()
            client.close()


def test_a_queue_that_exists_as_another_one_is_one_line_that_says_what_to_do(make: Make) -> None:
    client = make()
    classic = Queue(client.queue, durable=True)  # type: ignore[no-untyped-call]
    declare(client, classic)
    remedy = rf"delete_queue {client.queue} .*CELERY_TASK_DEFAULT_QUEUE_TYPE=classic"
    for sends in ("delay", "adelay"):
        with pytest.raises(PublishError, match=remedy):
            send(client.app, sends)
    with client.start("-P", "solo") as worker:
        assert worker.wait(30) == 1
        line = worker.output.strip().splitlines()[-1]
        assert line.startswith(f"error: queue {client.queue!r} exists on RabbitMQ")
        assert "Traceback" not in worker.output
    with client.worker("-P", "solo", CELERY_TASK_DEFAULT_QUEUE_TYPE="classic"):
        declare(client, classic)
