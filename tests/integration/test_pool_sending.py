"""Many bodies, callbacks and chords that send at once, with fewer producers than senders."""

from collections.abc import Iterator

import pytest
from celery.result import AsyncResult

from celeriac.embedded import Valkey
from support import empty_redis, given
from workers import BROKERS, Worker


@pytest.fixture(params=BROKERS)
def worker(request: pytest.FixtureRequest, valkey: Valkey) -> Iterator[Worker]:
    """One that is only starting, so that it finds all that is sent at once."""
    backend = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(backend)
    broker = given("TEST_AMQP_URL") if request.param == "rabbitmq" else backend
    starting = Worker("pool_app", "celeriac", broker, backend, "-c", "500")
    try:
        yield starting
    finally:
        starting.close()


def test_callbacks_and_bodies_that_send_do_not_wait_for_each_others_producers(
    worker: Worker,
) -> None:
    linked = worker.signature("wait", 0, "linked").set(immutable=True)
    sent = [worker.send("send_on", 2, link=linked) for _ in range(200)]
    worker.wait_until_ready()
    for sender in sent:
        for child in sender.get(timeout=30):
            assert AsyncResult(child, app=worker.client).get(timeout=30) == "waited"
    for _ in sent:
        assert worker.noted("linked-ended") == "returned"


def test_chords_that_bodies_start_do_not_wait_for_each_others_producers(worker: Worker) -> None:
    sent = [worker.send("start_chords", 4) for _ in range(60)]
    worker.wait_until_ready()
    for starter in sent:
        for callback in starter.get(timeout=30):
            assert AsyncResult(callback, app=worker.client).get(timeout=30) == 2


def test_groups_of_chords_that_bodies_send_do_not_wait_for_each_others_producers(
    worker: Worker,
) -> None:
    sent = [worker.send("send_chords") for _ in range(40)]
    worker.wait_until_ready()
    for sender in sent:
        for callback in sender.get(timeout=30):
            assert AsyncResult(callback, app=worker.client).get(timeout=30) == 1


def test_bodies_that_are_revoked_while_they_wait_for_a_producer_keep_none(worker: Worker) -> None:
    worker.wait_until_ready()
    holder = worker.send("hold_producers", "go")
    worker.noted("producers")
    doomed = [worker.send("send_on", 1) for _ in range(20)]
    for each in doomed:
        worker.process.wait_for(rf"send_on\[{each.id}\] received")
    worker.client.control.revoke(
        [each.id for each in doomed], terminate=True, destination=[worker.node]
    )
    for each in doomed:
        worker.process.wait_for(rf"Terminating {each.id} ")
    worker.notes.rpush("go", 1)
    holder.get(timeout=30)
    spared = [worker.send("send_on", 1) for _ in range(20)]
    assert [len(each.get(timeout=30)) for each in spared] == [1] * 20


def test_remote_control_answers_while_tasks_hold_all_producers(worker: Worker) -> None:
    worker.wait_until_ready()
    holder = worker.send("hold_producers", "go")
    worker.noted("producers")
    assert worker.control("ping") == {"ok": "pong"}
    assert worker.control("ping") == {"ok": "pong"}
    worker.notes.rpush("go", 1)
    holder.get(timeout=30)
