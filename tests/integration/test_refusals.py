"""What is no good message: refused, kept as a dead letter, and no harm to worker or neighbours."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import InvalidTaskError

from celeriac import dead
from celeriac.embedded import Valkey
from profiles import Profiled
from support import empty_redis, eventually, given
from workers import BROKERS

POOLS = {"solo": ["-P", "solo"], "prefork": ["-P", "prefork", "-c", "2"], "celeriac": ["-c", "2"]}
PLAIN = {"content_type": "application/json", "content_encoding": "utf-8"}
PICKLE = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
GOOD = json.dumps([["any"], {}, {}]).encode()


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def forged(unpickled: Path) -> dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]]:
    """Body, headers and properties of messages that no Celery has sent, by their ids."""
    evil = pickle.dumps([[Mischief(unpickled)], {}, {}])
    embedded = {"callbacks": 5, "chord": 7, "chain": "x"}
    first = {"task": "profile_app.note", "args": ["any"], "kwargs": {}}
    return {
        "pickled": (evil, {}, PICKLE),
        "pickled as JSON": (evil, {}, PLAIN),
        "truncated": (GOOD[:-4], {}, PLAIN),
        "empty": (b"", {}, PLAIN),
        "number": (b"42", {}, PLAIN),
        "short": (b"[1, 2]", {}, PLAIN),
        "no list": (b'[{"a": 1}, {}, {}]', {}, PLAIN),
        "deep": (b"[" * 100_000, {}, PLAIN),
        "what follows": (json.dumps([["any"], {}, embedded]).encode(), {}, PLAIN),
        "no type": (GOOD, {}, {"content_type": "any/thing", "content_encoding": "none"}),
        "not compressed": (GOOD, {"compression": "zlib"}, PLAIN),
        "unknown": (GOOD, {"task": "no.such.task"}, PLAIN),
        "no name": (GOOD, {"task": ["a", "list"]}, PLAIN),
        "no id": (GOOD, {"id": None}, PLAIN),
        "ETA": (GOOD, {"eta": "no time"}, PLAIN),
        "expiry": (GOOD, {"expires": "never"}, PLAIN),
        "retries": (GOOD, {"retries": "x"}, PLAIN),
        "time limit": (GOOD, {"timelimit": "abc"}, PLAIN),
        "time limits": (GOOD, {"timelimit": [1, "x"]}, PLAIN),
        "group": (GOOD, {"group": 5, "root_id": [1]}, PLAIN),
        "stamps": (GOOD, {"stamps": 3, "stamped_headers": 4}, PLAIN),
        "first protocol": (json.dumps(first).encode(), {"id": None, "task": None}, PLAIN),
        "oversized": (json.dumps([["x" * 20_000_000], {}, {}]).encode(), {}, PLAIN),
    }


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    if request.param == "rabbitmq":
        return given("TEST_AMQP_URL")
    url = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(url)
    return url


@pytest.fixture(params=POOLS)
def client(request: pytest.FixtureRequest, broker: str, valkey: Valkey) -> Iterator[Profiled]:
    empty_redis(valkey.celery_url)
    own = {"worker_pool": "celeriac.pool:TaskPool"} if request.param == "celeriac" else {}
    made = Profiled(broker, valkey.celery_url, **own)
    made.arguments = POOLS[request.param]
    yield made
    with made.app.connection_for_write() as connection:
        connection.default_channel.queue_delete(made.queue)
    made.close()


def forge(
    client: Profiled, body: bytes, headers: dict[str, Any], properties: dict[str, Any]
) -> None:
    with client.app.connection_for_write() as connection:
        channel = connection.default_channel
        message = channel.prepare_message(body, headers=headers, **properties)
        channel.basic_publish(message, exchange="", routing_key=client.queue)


def test_what_is_no_good_message_is_refused_and_harms_no_other(
    client: Profiled, tmp_path: Path
) -> None:
    unpickled = tmp_path / "unpickled"
    with client.worker(*client.arguments) as worker:
        for task_id, (body, headers, properties) in forged(unpickled).items():
            given = {"id": task_id, "task": "profile_app.note"} | headers
            given = {name: value for name, value in given.items() if value is not None}
            forge(client, body, given, properties)
        for number in range(20):
            assert client.send("note", f"after-{number}").get(timeout=30)
        assert worker.running
        assert worker.output.count(" ready.") == 1
        assert "Unrecoverable" not in worker.output
        assert not unpickled.exists()
        refused = {"pickled", "truncated", "time limit", "unknown"}
        with dead.letters(client.app) as kept:
            buried = {letter.id: letter for letter in kept.each()}
        if "oversized" in buried:  # not on Redis, where it does not reach the worker
            refused.add("oversized")
        else:
            assert any(each.size > 20_000_000 for each in buried.values())
        assert refused <= buried.keys()
        for task_id in refused:
            result = client.app.AsyncResult(task_id)
            eventually(result.failed, what=task_id)
            if task_id != "unknown":
                assert isinstance(result.result, InvalidTaskError)
        (reserved,) = client.control("reserved").values()
        assert reserved == []
