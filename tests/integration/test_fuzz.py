"""Whatever somebody writes into a queue: it is kept or it runs, once, and the worker goes on."""

import base64
import copy
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from amqp.basic_message import Message
from celery import Celery
from redis import Redis

from celeriac import adopt
from celeriac.dead import letters
from celeriac.embedded import Valkey
from celeriac.store import redis_url
from support import close_results, empty_redis, eventually, given
from workers import Worker

SEED = 4
COUNT = 400
LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}

_DEEP: Any = "deep"  # stands for lists in lists, which no JSON encoder writes
WRONG: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 10**400, float("inf"), float("nan"), "", "x", "\x00", "\ud800",
    "x" * 100_000, [], [[]], [1, "x"], ["x"], {}, {"a": 1}, {"task": "no.such"}, [{"task": 5}],
    {"__type__": "datetime", "__value__": "x"}, {"__type__": "x", "__value__": 1}, _DEEP,
]  # fmt: skip
GONE = object()


def good(number: int, queue: str) -> dict[str, Any]:
    """A message as Celery sends one, and kombu writes it into Redis."""
    task_id = f"id-{number}"
    headers: dict[str, Any] = {
        "lang": "py", "task": "pool_app.take", "id": task_id, "shadow": None, "eta": None,
        "expires": None, "group": None, "group_index": None, "retries": 0,
        "timelimit": [None, None], "root_id": task_id, "parent_id": None, "argsrepr": "()",
        "kwargsrepr": "{}", "origin": "any@host", "ignore_result": False,
        "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
    }  # fmt: skip
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return {
        "body": [[f"fuzz-{number}", 0], {}, embedded],
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": task_id, "reply_to": "", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": queue, "redelivered": False},
            "body_encoding": "base64", "delivery_tag": f"tag-{number}",
        },
    }  # fmt: skip


def paths(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if before:
        yield before
    if isinstance(tree, dict):
        for name, each in tree.items():
            yield from paths(each, (*before, name))
    elif isinstance(tree, list):
        for place, each in enumerate(tree):
            yield from paths(each, (*before, place))


def change(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree[name]
    if value is not GONE:
        tree[path[-1]] = copy.deepcopy(value)
    elif isinstance(tree, dict):
        del tree[path[-1]]
    else:
        tree.pop(path[-1])


def written(value: Any) -> bytes:
    text = json.dumps(value)
    return text.replace('"deep"', "[" * 5000 + "]" * 5000).replace("Infinity", "1e999").encode()


def garbled(raw: bytes, chance: random.Random) -> bytes:
    made = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(made))
        match chance.randrange(4):
            case 0:
                made[place] = chance.randrange(256)
            case 1:
                del made[place:]
                made += b"!"  # never empty
            case 2:
                made[place:place] = bytes(chance.randrange(256) for _ in range(3))
            case 3:
                del made[place : place + chance.randrange(1, 40)]
                made += b"!" * (not made)
    return bytes(made)


def mutated(number: int, queue: str, chance: random.Random) -> tuple[dict[str, Any], bytes]:
    """A message with something wrong in it, and its body."""
    made = good(number, queue)
    for _ in range(chance.choice([1, 1, 1, 2])):
        path = chance.choice(list(paths(made)))
        change(made, path, chance.choice([GONE, *WRONG]))
    body = written(made.pop("body", None))
    return made, garbled(body, chance) if chance.random() < 0.1 else body


def through_redis(worker: Worker, url: str, chance: random.Random) -> int:
    raw = []
    for number in range(COUNT):
        made, body = mutated(number, worker.queue, chance)
        if chance.random() < 0.9:
            made["body"] = base64.b64encode(body).decode()
        text = written(made)
        raw.append(garbled(text, chance) if chance.random() < 0.2 else text)
    with Redis.from_url(redis_url(url)) as broker:
        for each in raw:
            broker.lpush(worker.queue, each)
    return len(set(raw))


def through_amqp(worker: Worker, url: str, chance: random.Random) -> int:
    app = Celery("forger", broker=url, set_as_current=False)
    sent = 0
    with app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
        for number in range(COUNT):
            forged = as_amqp(*mutated(number, worker.queue, chance))
            try:
                channel = connection.default_channel
                channel.basic_publish(forged, exchange="", routing_key=worker.queue)
            except Exception:  # AMQP has no such value: its library refuses it, or RabbitMQ does
                connection.close()
            else:
                sent += 1
    assert sent > COUNT / 2
    return sent


def as_amqp(made: dict[str, Any], body: bytes) -> Message:
    kinds = {f"content_{name}": made.get(f"content-{name}") for name in ("type", "encoding")}
    properties = made.get("properties")
    priority = properties.get("priority") if isinstance(properties, dict) else None
    return Message(
        body,
        application_headers=made.get("headers"),
        priority=priority if priority in range(10) else None,
        **{name: each[:200] for name, each in kinds.items() if isinstance(each, str)},
    )


SENDERS: dict[str, Callable[[Worker, str, random.Random], int]] = {
    "redis": through_redis,
    "rabbitmq": through_amqp,
}


@pytest.mark.parametrize("pool", ["celeriac", "prefork", "solo"])
@pytest.mark.parametrize("kind", SENDERS)
def test_any_message_is_kept_or_runs_once_and_the_worker_goes_on(
    kind: str, pool: str, valkey: Valkey
) -> None:
    empty_redis(valkey.celery_url)
    broker = given("TEST_AMQP_URL") if kind == "rabbitmq" else valkey.celery_url
    conf = json.dumps(LATE)
    with Worker("pool_app", pool, broker, valkey.celery_url, CONF=conf, LEASE="30") as worker:
        sent = SENDERS[kind](worker, broker, random.Random(SEED))
        after = [worker.send("wait", 0.05, "good") for _ in range(20)]
        assert {each.get(timeout=60) for each in after} == {"waited"}
        app = adopt(Celery("fuzz", broker=broker, backend=valkey.celery_url, set_as_current=False))
        app.conf.broker_pool_limit = 0

        def taken() -> int:
            """Messages that are letters, or that the worker took for good ones."""
            received = len(re.findall(r"Task .*\] received", worker.process.output))
            with letters(app) as kept:
                return received - len(after) + len(kept)

        eventually(lambda: taken() >= sent, 30, f"{sent} messages in letters and in the log")
        assert taken() == sent
        ran = Counter(key for key in worker.notes.scan_iter("note:fuzz-*"))
        assert all(worker.notes.llen(key) == 1 for key in ran)
        assert len(ran) > COUNT / 10  # most changes change too little
        eventually(lambda: not worker.control("active"), 30)
        assert worker.control("reserved") == []
        for key in ("unacked", "unacked_index", worker.queue):
            eventually(lambda: not worker.notes.exists(key), what=f"no {key}")  # noqa: B023
        output = worker.process.output
        assert worker.process.running
        assert output.count(" ready.") == 1
        assert "Unrecoverable" not in output
        assert "Connection to broker lost" not in output
        close_results(app.backend)
    if kind == "rabbitmq":
        with worker.client.connection_for_write() as connection:
            connection.default_channel.queue_delete(worker.queue)
