"""What RabbitMQ gives up on ends in a state that says why, and is kept."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from amqp.basic_message import Message
from celery import chord
from celery.exceptions import ChordError, NotRegistered, TaskRevokedError
from kombu.entity import Queue

from celeriac import dead, rabbitmq
from celeriac.embedded import Valkey
from celeriac.errors import DeadLetterError, DeliveryLimitError, UndeliveredError
from profiles import Profiled
from support import close_results, empty_redis, eventually, given

SOLO = ("-P", "solo")
PLAIN = {"content_type": "application/json", "content_encoding": "utf-8"}


@contextmanager
def profiled(backend: str) -> Iterator[Profiled]:
    """A client on RabbitMQ, with a queue `limited` that nobody consumes and that soon gives up."""
    made = Profiled(given("TEST_AMQP_URL"), backend)
    made.limited = rabbitmq.queue(f"{made.queue}-limited")
    made.limited.queue_arguments["x-delivery-limit"] = 1
    declared(made, made.limited, rabbitmq.dead_queue())
    yield made
    with made.app.connection_for_write() as connection:
        for queue in (made.queue, made.limited.name, f"{made.queue}-other"):
            connection.default_channel.queue_delete(queue)
    made.close()


def declared(client: Profiled, *queues: Queue) -> None:
    with client.app.connection_for_write() as connection:
        for queue in queues:
            bound: Any = queue
            bound(connection.default_channel).declare()
        connection.default_channel.queue_purge(rabbitmq.DEAD)


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Profiled]:
    empty_redis(valkey.celery_url)
    with profiled(valkey.celery_url) as made:
        yield made


def signature(client: Profiled, *args: object, name: str = "note", **options: object) -> Any:
    """Of a task that is sent to the queue that gives up."""
    to = {"exchange": client.limited.exchange, "routing_key": client.limited.routing_key}
    return client.app.signature(f"profile_app.{name}", args).set(**to, **options)


def deliver(client: Profiled, *, times: int, requeue: bool = True, count: int = 1) -> None:
    """Take messages and give them back, as workers do that die of them."""
    with client.app.connection_for_read() as connection:
        channel = connection.default_channel
        for _ in range(times * count):
            message = eventually(lambda: channel.basic_get(client.limited.name))
            channel.basic_reject(message.delivery_tag, requeue=requeue)


def put(client: Profiled, body: bytes, headers: dict[str, Any], **properties: Any) -> None:
    """Into the dead letters, as anybody could."""
    with client.app.connection_for_write() as connection:
        message = Message(body, application_headers=headers, **(properties or PLAIN))
        connection.default_channel.basic_publish(message, exchange=rabbitmq.DEAD, routing_key="x")


def the_letter(client: Profiled, task_id: str) -> tuple[dead.Letter, bytes]:
    def found() -> tuple[dead.Letter, bytes] | None:
        with dead.letters(client.app) as kept:
            try:
                return kept.get(task_id)
            except DeadLetterError:
                return None

    return eventually(found, 20, f"a letter {task_id}")


def all_letters(client: Profiled) -> list[dead.Letter]:
    with dead.letters(client.app) as kept:
        return list(kept.each())


def settled(client: Profiled) -> bool:
    with client.app.connection_for_read() as connection:
        asked = connection.default_channel.queue_declare(rabbitmq.DEAD, passive=True)
        return bool(asked.message_count == 0)


def test_a_message_at_its_limit_of_deliveries_fails_and_is_kept(client: Profiled) -> None:
    with client.worker(*SOLO), client.worker(*SOLO, "-n", f"{client.queue}-2@%h"):
        failing = signature(client, "alone", name="note").on_error(
            client.app.signature("profile_app.failed")
        )
        sent = failing.apply_async(priority=3)
        body = client.app.signature("profile_app.note", ("body",))
        group = chord(
            [signature(client, "part"), client.app.signature("profile_app.note", ("other",))], body
        ).apply_async()
        deliver(client, times=2, count=2)
        with pytest.raises(DeliveryLimitError, match=client.limited.name) as raised:
            sent.get(timeout=20)
        assert str(raised.value).count("limit of deliveries") == 1
        assert "DeliveryLimitError" in str(
            eventually(lambda: client.notes.lpop("note:errback"), what="the errback")
        )
        with pytest.raises((ChordError, DeliveryLimitError), match="limit of deliveries"):
            group.get(timeout=20)
        letter, raw = the_letter(client, sent.id)
        assert (letter.reason, letter.task) == ("delivery limit", "profile_app.note")
        assert letter.queue == client.limited.name
        headers = json.loads(raw)["headers"]
        assert not [name for name in headers if name.startswith("x-")]
        assert len(all_letters(client)) == 2
        assert settled(client)
        dead.send_again(client.app, sent.id)
        assert client.app.AsyncResult(sent.id).state == "PENDING"
        with client.app.connection_for_read() as connection:
            again = eventually(lambda: connection.default_channel.basic_get(client.limited.name))
            assert again.headers["id"] == sent.id


def test_an_end_that_is_stored_stays(client: Profiled) -> None:
    done, undone = (signature(client, "any").apply_async() for _ in range(2))
    client.app.backend.mark_as_done(done.id, "done")
    client.app.backend.mark_as_failure(undone.id, ValueError("its own"))
    with client.worker(*SOLO):
        deliver(client, times=2, count=2)
        assert the_letter(client, undone.id)[0].reason == "delivery limit"
        eventually(lambda: settled(client))
        assert [letter.id for letter in all_letters(client)] == [undone.id]
        assert (done.state, done.result) == ("SUCCESS", "done")
        with pytest.raises(ValueError, match="its own"):
            undone.get(timeout=5)


def test_what_expires_is_revoked_and_no_letter(client: Profiled) -> None:
    with client.worker(*SOLO):
        sent = signature(client, "any").apply_async(expires=0.3)
        with pytest.raises(TaskRevokedError, match="expired"):
            sent.get(timeout=20)
        assert sent.state == "REVOKED"
        assert all_letters(client) == []


def test_what_is_rejected_is_kept_with_the_reason_that_a_worker_gave(client: Profiled) -> None:
    with client.worker(*SOLO):
        dropped = signature(client, "any").apply_async()
        deliver(client, times=1, requeue=False)
        with pytest.raises(UndeliveredError, match="rejected"):
            dropped.get(timeout=20)
        assert the_letter(client, dropped.id)[0].reason == "rejected"
        unknown = client.app.send_task("profile_app.newer", queue=client.queue)
        assert the_letter(client, unknown.id)[0].reason == "unknown task"
        eventually(lambda: settled(client))
        with dead.letters(client.app) as kept:
            assert kept.get(unknown.id)[0].reason == "unknown task"
            assert len(kept) == 2
        assert isinstance(unknown.result, NotRegistered)


DEATHS: list[Any] = [
    None, 5, "x", [], ["x"], [{}], [{"reason": 5, "queue": "q"}], [{"reason": "maxlen"}],
    [{"reason": "delivery_limit", "queue": "q", "exchange": 5, "routing-keys": "x"}],
    [{"reason": "rejected", "queue": "q", "routing-keys": [5], "count": "x"}],
    [{"reason": "expired", "queue": "q"}],
]  # fmt: skip


def test_whatever_is_put_there_is_kept_and_harms_nobody(client: Profiled) -> None:
    bodies = [
        b"",
        b"\x80\x04",
        b"[[]",
        b"[" * 10_000,
        b'[["x"], {}, {"chord": 5, "errbacks": "x"}]',
    ]
    with client.worker(*SOLO) as worker:
        count = 0
        for number, death in enumerate(DEATHS):
            for place, body in enumerate(bodies):
                task_id = f"{number}-{place}"
                headers = {"id": task_id, "task": "profile_app.note", "x-death": death}
                headers = {name: each for name, each in headers.items() if each is not None}
                put(client, body, headers)
                put(client, body, headers | {"id": {"a": task_id}, "task": [5]})
                count += 0 if death == DEATHS[-1] else 2
        put(client, b"not zlib", {"compression": "zlib", "id": "unpacked"})
        put(client, b"any", {}, content_type="application/x-python-serialize")
        eventually(lambda: len(all_letters(client)) >= count + 2, 30)
        eventually(lambda: settled(client))
        assert len(all_letters(client)) == count + 2
        assert client.send("note", "after").get(timeout=20)
        assert worker.running
        assert worker.output.count(" ready.") == 1
        result = client.app.AsyncResult
        assert result("8-0").state == result("9-0").state == "FAILURE"
        assert result("10-0").state == "REVOKED"
        assert result("0-0").state == "PENDING"  # nobody has said that it is dead


def test_a_run_that_goes_on_ends_as_it_does(client: Profiled) -> None:
    other = f"{client.queue}-other"
    free = ("-P", "threads", "-c", "2")  # whose main loop goes on, whichever takes it
    with client.worker(*free), client.worker(*free, "-Q", other, "-n", f"{other}@%h"):
        running = client.send("slow", "slow", 4)
        client.noted("slow", 1)
        death = [{"reason": "delivery_limit", "queue": client.queue}]
        headers = {"id": running.id, "task": "profile_app.slow", "x-death": death, "retries": 0}
        put(client, json.dumps([["slow", 4], {}, {}]).encode(), headers)
        assert running.get(timeout=20) == "slow"
        eventually(lambda: settled(client), 20)
        assert all_letters(client) == []
        assert running.state == "SUCCESS"


def test_without_results_it_waits(valkey: Valkey, tmp_path: Any) -> None:
    empty_redis(valkey.celery_url)
    with ExitStack() as stack:
        results = stack.enter_context(Valkey(tmp_path))
        client = stack.enter_context(profiled(results.celery_url))
        worker = stack.enter_context(client.worker(*SOLO, NOTES=valkey.celery_url))
        sent = signature(client, "any").apply_async()
        close_results(client.app.backend)
        results.stop()
        deliver(client, times=2)
        worker.wait_for("what RabbitMQ gave up on waits", count=2)
        results.start()
        eventually(lambda: client.app.AsyncResult(sent.id).failed(), 30)
        assert the_letter(client, sent.id)[0].reason == "delivery limit"
        eventually(lambda: settled(client))
        assert worker.output.count(" ready.") == 1
