"""Messages that are none, or ask for what there is not: refused, recorded, and no worker harmed."""

import json
import pickle
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from kombu.utils.uuid import uuid

from chaos.servers import RedisServer
from chaos.stage import LEASE, LONG, POOLS, Stage, cast

OVERSIZED = 20 * 2**20  # bytes
ON_REDIS = pytest.mark.parametrize("broker", ["redis"], indirect=True)


def task_headers(**changes: object) -> dict[str, object]:
    return {"task": "chaos_app.work", "id": uuid(), "lang": "py", "root_id": None} | changes


def body(*args: object) -> bytes:
    return json.dumps([args, {}, {"callbacks": None, "errbacks": None}]).encode()


class Forged:
    """What a sender may write who is no Celery, or no friend."""

    def __init__(self) -> None:
        pickled = pickle.dumps([("pickled",), {}, {}])
        plain = {"content_type": "application/json", "content_encoding": "utf-8"}
        self.messages: dict[str, tuple[bytes, dict[str, object], dict[str, str]]] = {
            "pickled": (
                pickled,
                task_headers(),
                {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
            ),
            "pickle that says JSON": (pickled, task_headers(), plain),
            "truncated": (body("truncated")[:-7], task_headers(), plain),
            "no task": (body("no task"), {"id": uuid()}, plain),
            "no id": (body("no id"), {"task": "chaos_app.work"}, plain),
            "unknown task": (body("unknown"), task_headers(task="os.system"), plain),
            "unknown type": (body("type"), task_headers(), {**plain, "content_type": "text/x"}),
            "no arguments": (b"{}", task_headers(), plain),
            "a text": (b'"text"', task_headers(), plain),
            "not a date": (body("eta"), task_headers(eta="tomorrow"), plain),
            "not a limit": (body("limit"), task_headers(timelimit="soon"), plain),
        }  # fmt: skip


@cast(*product(["redis"], POOLS), ("rabbitmq", "celeriac"))
def test_what_is_no_task_is_refused_and_recorded_and_harms_nobody(
    stage: Callable[..., Stage], pool: str
) -> None:
    forged = Forged().messages
    with stage() as play:
        worker = play.worker(pool, 4).wait_until_ready()
        good = [play.send("work", "before")]
        with play.client.connection_for_write() as connection:
            for payload, headers, properties in forged.values():
                publish(connection, play.token, payload, headers, properties)
        good.append(play.send("work", "after"))
        assert set(play.ended(good).values()) == {"SUCCESS"}
        play.eventually(lambda: play.in_broker() == 0, 15, "an empty queue")
        time.sleep(LEASE + 1)
        kept = play.dead_letters()
        assert len(kept) == len(forged), [(each.reason, each.error) for each in kept]
        assert play.in_broker() == 0  # and nothing came back
        assert worker.process.running
        assert set(play.runs()) == {"before", "after"}


def publish(
    connection: Any,
    queue: str,
    payload: bytes,
    headers: dict[str, object],
    properties: dict[str, str],
) -> None:
    connection.Producer().publish(payload, routing_key=queue, headers=headers, **properties)


@ON_REDIS  # RabbitMQ has a limit of its own, and refuses the sender
@pytest.mark.parametrize("pool", list(POOLS) if LONG else ["celeriac"])
def test_an_oversized_message_is_refused_and_recorded_and_harms_nobody(
    stage: Callable[..., Stage], pool: str
) -> None:
    with stage() as play:
        worker = play.worker(pool, 4).wait_until_ready()
        with play.client.connection_for_write() as connection:
            properties = {"content_type": "application/json", "content_encoding": "utf-8"}
            payload = body("x" * OVERSIZED)
            publish(connection, play.token, payload, task_headers(), properties)
        good = [play.send("work", "after")]
        assert set(play.ended(good).values()) == {"SUCCESS"}
        play.eventually(play.dead_letters, 15, "a dead letter")
        assert set(play.runs()) == {"after"}
        assert worker.process.running


@ON_REDIS
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_not_even_a_message_is_refused_and_recorded_and_harms_nobody(
    stage: Callable[..., Stage], redis: RedisServer, pool: str
) -> None:
    def envelope(**changes: object) -> bytes:
        whole = {"body": "e30=", "headers": task_headers(), "content-type": "application/json"}
        return json.dumps(whole | changes).encode()

    info = {"exchange": "", "routing_key": "any"}
    properties = {"delivery_tag": "TAG", "delivery_info": info, "body_encoding": "base64"}
    broken = [
        b"",
        b'{"body": "tru',
        b"\x80\x04pickled",
        b"[1, 2]",
        b"null",
        b"7",
        envelope(),
        envelope(properties={}),
        envelope(properties=properties | {"delivery_tag": 7}),
        envelope(properties=properties | {"delivery_info": "x"}),
        envelope(properties=properties, body="?"),
        envelope(properties=properties, body=None),
        envelope(properties=properties, headers="none"),
        b"[" * 100_000,
    ]
    with stage() as play, redis.client() as client:
        good = [play.send("work", "before")]
        for each in broken:
            client.lpush(play.token, each.replace(b"TAG", uuid().encode()))
        good.append(play.send("work", "after"))
        worker = play.worker(pool, 4).wait_until_ready()
        assert set(play.ended(good).values()) == {"SUCCESS"}
        play.eventually(lambda: play.in_broker() == 0, 15, "an empty queue")
        assert len(play.dead_letters()) == len(broken), play.dead_letters()
        assert worker.process.running
