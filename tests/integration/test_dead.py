"""Dead letters: each is kept, shown safely, sent again whole, and gone when it is discarded."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery import Celery
from kombu.entity import Exchange, Queue
from redis import Redis

from celeriac import PublishError, adopt, dead
from celeriac.dead import Letters, letters, send_again
from celeriac.embedded import Valkey
from celeriac.errors import DeadLetterError
from support import clean_environment, close_results, empty_redis, eventually, given, run_python
from workers import APPS, BROKERS, Worker

LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, valkey: Valkey) -> str:
    empty_redis(valkey.celery_url)
    if request.param == "redis":
        empty_redis(given("TEST_REDIS_URL"))
    urls = {"rabbitmq": "TEST_AMQP_URL", "redis": "TEST_REDIS_URL"}
    return given(urls[request.param]) if request.param in urls else valkey.celery_url


@contextmanager
def worker(
    broker: str, valkey: Valkey, *options: str, pool: str = "celeriac", **env: str
) -> Iterator[Worker]:
    urls = broker, valkey.celery_url
    made = Worker("pool_app", pool, *urls, *options, CONF=json.dumps(LATE), LEASE="2", **env)
    with made:
        yield made
    if broker.startswith("amqp"):
        with made.client.connection_for_write() as connection:
            connection.default_channel.queue_delete(made.queue)


@contextmanager
def client(broker: str, valkey: Valkey) -> Iterator[Celery]:
    """An app that knows where the letters are."""
    app = adopt(Celery("dead", broker=broker, backend=valkey.celery_url, set_as_current=False))
    app.conf.broker_pool_limit = 0
    yield app
    close_results(app.backend)


def the_letter(app: Celery, task_id: str, timeout: float = 15.0) -> tuple[dead.Letter, bytes]:
    def found() -> tuple[dead.Letter, bytes] | None:
        with letters(app) as kept:
            try:
                return kept.get(task_id)
            except DeadLetterError:
                return None

    return eventually(found, timeout, what=f"a dead letter {task_id}")


def kept_here(valkey: Valkey, prefix: str = "") -> tuple[Redis, Letters]:
    empty_redis(valkey.celery_url)
    here = Redis.from_url(valkey.redis_url)
    return here, Letters(here, prefix)


# What is kept


def test_the_same_message_twice_is_one_letter_and_another_one_of_its_id_is_another(
    valkey: Valkey,
) -> None:
    here, kept = kept_here(valkey, "mine:")
    with here:
        for raw, reason in (("one", "poison"), ("one", "retries"), ("two", "invalid")):
            kept.bury({"id": "a", "task": "any"}, raw, reason, "queue")
        kept.bury({"id": "a"}, "one", "rejected", "elsewhere", first=True)
        found = {letter.id: letter for letter in kept.each()}
        assert len(found) == len(kept) == 2
        assert found["a"].reason == "retries"
        (other,) = found.keys() - {"a"}
        assert kept.get(other)[1] == b"two"
        assert set(here.scan_iter()) == {b"mine:celeriac:dead", b"mine:celeriac:dead:raw"}


def test_a_letter_that_is_one_again_is_not_discarded_with_the_old_one(valkey: Valkey) -> None:
    here, kept = kept_here(valkey)
    with here:
        for first in (False, True):
            kept.bury({"id": "a", "task": "any"}, "raw", "poison", "queue")
            old, _ = kept.get("a")
            kept.bury({"id": "a", "task": "any"}, "raw", "poison", "queue", first=first)
            assert kept.discard(old) == 0
            assert kept.discard("a") == 1
        assert len(kept) == 0
        assert not here.keys("*")


@pytest.mark.parametrize("task_id", [None, 5, ["a"], "x" * 1000, "line\nbreak", "\ud800", ""])
def test_what_is_no_id_gives_the_letter_none(valkey: Valkey, task_id: object) -> None:
    here, kept = kept_here(valkey)
    with here:
        kept.bury({"id": task_id, "task": ["no", "name"]}, "raw", "invalid", None, "e" * 10_000)
        (letter,) = kept.each()
        assert (letter.id, letter.task, letter.queue) == (dead.id_of(b"raw"), None, None)
        assert len(letter.error or "") == 1000


def test_of_a_hundred_thousand_letters_the_newest_are_listed(valkey: Valkey) -> None:
    here, kept = kept_here(valkey)
    with here:
        for start in range(0, 100_000, 10_000):
            with here.pipeline(transaction=False) as pipe:
                for number in range(start, start + 10_000):
                    known = {
                        "reason": "poison",
                        "task": f"t{number % 7}",
                        "time": number,
                        "size": 3,
                    }
                    pipe.hset("celeriac:dead", f"id-{number}", json.dumps(known))
                    pipe.hset("celeriac:dead:raw", f"id-{number}", "raw")
                pipe.execute()
        asked = cli("list", "--limit", "5", "--json", broker=valkey.celery_url, valkey=valkey)
        assert [json.loads(line)["time"] for line in asked.stdout.splitlines()] == [
            99_999, 99_998, 99_997, 99_996, 99_995,
        ]  # fmt: skip
        assert "the newest 5 of 100000" in asked.stderr
        wanted = [letter.time for letter in kept.newest(3, task="t1", reason="poison")]
        assert wanted == [99_996, 99_989, 99_982]
        gone = cli("discard", "--all", "--task", "t1", broker=valkey.celery_url, valkey=valkey)
        assert gone.stdout == "discarded: 14286\n"
        assert here.hlen("celeriac:dead") == here.hlen("celeriac:dead:raw") == 100_000 - 14_286


def message(**changes: Any) -> Any:
    made = {
        "body": b"[[], {}, {}]", "content_type": "application/json", "content_encoding": "utf-8",
        "headers": {"id": "a", "task": "any"}, "properties": {"delivery_tag": "1", "priority": 3},
        "delivery_info": {"exchange": "e", "routing_key": "k"}, "errors": [],
    }  # fmt: skip
    return SimpleNamespace(**made | changes)


def test_a_message_reads_the_same_whatever_it_has_gone_through() -> None:
    once = dead.message_of(message())
    headers = {
        "task": "any",
        "id": "a",
        "redelivered": True,
        "x-death": [{}],
        "compression": "zlib",
    }
    properties = {"delivery_tag": "2", "priority": 3, "expiration": "5"}
    assert dead.message_of(message(headers=headers, properties=properties)) == once
    elsewhere = message(delivery_info={"exchange": "celeriac.dead", "routing_key": "k"})
    assert dead.message_of(elsewhere, exchange="e") == once
    unpacked = json.loads(dead.message_of(message(headers=headers, errors=["not decompressed"])))
    assert unpacked["headers"]["compression"] == "zlib"  # its body is as it came


def test_a_message_that_cannot_be_written_keeps_its_body() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert "W1tdLCB7fSwge31d" in dead.message_of(message(headers={"id": nested, "task": "any"}))
    while nested:  # one by one: to forget them all at once is a recursion too
        nested = nested[0]


# The command


def cli(*arguments: str, broker: str, valkey: Valkey, cwd: Path = APPS) -> Any:
    env = clean_environment(BROKER=broker, BACKEND=valkey.celery_url)
    command = ["-m", "celeriac.cli", "dead", arguments[0], "-A", "pool_app.celery", *arguments[1:]]
    return run_python(*command, cwd=cwd, env=env, timeout=60)


def test_letters_are_listed_shown_and_discarded_whatever_is_in_them(valkey: Valkey) -> None:
    here, kept = kept_here(valkey)
    evil = "\x1b[2J\nid-2  fake\u202e"
    with here:
        made = message(
            headers={"id": "good", "task": "any", "note": evil}, body=b'{"a": [1, "\xc3\xa9"]}'
        )
        kept.bury(made.headers, dead.message_of(made), "poison", evil, evil + "e" * 1000)
        binary = message(headers={"id": "bin", "task": "any"}, body=b"\x80\x04\x1b[2J" * 5000)
        kept.bury(binary.headers, dead.message_of(binary), "unreadable", "q", "DecodeError()")
        raw = b'{"body": "cut\x1b[2J\xff'
        known = {"reason": "too large", "list": "q\x06\x163", "size": len(raw), "time": time.time()}
        here.hset("celeriac:dead", dead.id_of(raw), json.dumps(known))
        here.hset("celeriac:dead:raw", dead.id_of(raw), raw)
    urls: dict[str, Any] = {"broker": valkey.celery_url, "valkey": valkey}

    listed = cli("list", **urls)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 300
    assert lines[0].startswith(f"{dead.id_of(raw)}  -  q  too large  20")
    for command in (
        ["list", "--json"],
        ["show", "good"],
        ["show", "bin"],
        ["show", dead.id_of(raw)],
    ):
        shown = cli(*command, **urls)
        assert shown.returncode == 0, shown.stderr
        listed.stdout += shown.stdout
    assert not {"\x1b", "\u202e", "\x80"} & set(listed.stdout)
    assert '"é"' in cli("show", "good", **urls).stdout
    assert len(cli("show", "bin", **urls).stdout) < 60_000

    none = cli("show", "nothing", **urls)
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr.startswith("error: there is no dead letter 'nothing'")
    refused = cli("retry", dead.id_of(raw), "nothing", **urls)
    assert (refused.returncode, refused.stdout) == (1, "sent again: 0\n")
    assert len(refused.stderr.splitlines()) == 2
    assert "cannot be sent again (too large)" in refused.stderr
    gone = cli("discard", dead.id_of(raw), "bin", "bin", **urls)
    assert (gone.returncode, gone.stdout) == (1, "discarded: 2\n")
    assert cli("discard", "--all", "--reason", "poison", **urls).stdout == "discarded: 1\n"
    assert cli("list", **urls).stdout == ""


@pytest.mark.parametrize(
    "arguments", [["retry"], ["discard", "a", "--all"], ["retry", "a", "--task", "t"]]
)
def test_it_is_said_which_letters_are_meant(arguments: list[str], valkey: Valkey) -> None:
    asked = cli(*arguments, broker=valkey.celery_url, valkey=valkey)
    assert asked.returncode == 2
    assert "Traceback" not in asked.stderr


def test_a_server_that_is_away_is_a_line(valkey: Valkey, tmp_path: Path) -> None:
    nowhere = f"redis+socket://{tmp_path}/none?virtual_host=0"
    asked = cli("list", broker=nowhere, valkey=valkey)
    assert asked.returncode == 1
    assert asked.stderr.startswith("error: where dead letters are kept does not answer")
    assert len(asked.stderr.splitlines()) == 1
    missing = cli("list", broker=valkey.celery_url, valkey=valkey, cwd=tmp_path)
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)


def test_without_a_redis_there_is_no_place_for_letters() -> None:
    app = adopt(Celery("none", broker="memory://", backend="cache+memory://", set_as_current=False))
    with pytest.raises(DeadLetterError, match="neither"), letters(app):
        pass


# Sent again


def test_an_old_workers_unknown_task_runs_on_a_new_one(broker: str, valkey: Valkey) -> None:
    with worker(broker, valkey) as old, client(broker, valkey) as app:
        default = {"exchange": "", "routing_key": old.queue}
        sent = {
            old.send("newer", key, priority=7, **to).id: key
            for key, to in {"named": {"queue": old.queue}, "default": default}.items()
        }
        for task_id in sent:
            eventually(old.client.AsyncResult(task_id).failed)
            letter, _ = the_letter(app, task_id)
            assert (letter.task, letter.reason) == ("pool_app.newer", "unknown task")
            assert letter.queue == old.queue
        assert old.send("wait", 0).get(timeout=20) == "waited"
        for task_id in sent:  # the old one may have it again before the letter is discarded
            send_again(app, task_id)
            eventually(old.client.AsyncResult(task_id).failed)
            the_letter(app, task_id)
        old.process.stop()
        again = cli("retry", "--all", "--task", "pool_app.newer", broker=broker, valkey=valkey)
        assert again.stdout == "sent again: 2\n", again.stderr
        assert {old.client.AsyncResult(task_id).state for task_id in sent} == {"PENDING"}
        with letters(app) as kept:
            assert len(kept) == 0
        with worker(broker, valkey, "-Q", old.queue, NEWER="1") as new:
            assert {new.client.AsyncResult(each).get(timeout=30) for each in sent} == set(
                sent.values()
            )
            for key in sent.values():
                assert new.noted(key) == "ran"
                assert not new.notes.exists(f"note:{key}")


def test_a_letter_is_sent_whole_and_gets_its_starts_anew(broker: str, valkey: Valkey) -> None:
    queue = f"letters-{os.getpid()}"
    queue_of, exchange_of = cast(Any, Queue), cast(Any, Exchange)
    with client(broker, valkey) as app:
        to = queue_of(queue, exchange_of("letters", "topic"), f"{queue}.key")
        app.conf.task_queues = [to]
        with app.connection_for_write() as connection:
            to(connection.default_channel).declare()
        headers = {"id": "whole", "task": "any", "retries": 2, "own": "kept"}
        letter = message(
            headers=headers,
            properties={"priority": 6, "correlation_id": "whole", "delivery_tag": "1"},
            delivery_info={"exchange": "letters", "routing_key": f"{queue}.key"},
        )  # fmt: skip
        with letters(app) as kept:
            kept.bury(headers, dead.message_of(letter), "poison", queue)
        app.backend.mark_as_failure("whole", ValueError("poison"))
        results = app.backend.client
        results.hset("celeriac:runs", "whole:2:0", '{"n":3,"w":"gone","k":"x","t":1}')
        send_again(app, "whole")
        assert app.AsyncResult("whole").state == "PENDING"
        assert not results.hexists("celeriac:runs", "whole:2:0")
        with letters(app) as kept:
            assert len(kept) == 0
        with app.connection_for_read() as connection:
            arrived = to(connection.default_channel).get(no_ack=True)
            assert arrived.body in (letter.body, letter.body.decode())
            assert arrived.headers == headers
            assert arrived.properties["priority"] == 6
            assert arrived.properties["correlation_id"] == "whole"
            assert (arrived.content_type, arrived.content_encoding) == ("application/json", "utf-8")
            to(connection.default_channel).delete()


def test_what_no_queue_takes_stays_a_letter(broker: str, valkey: Valkey) -> None:
    with client(broker, valkey) as app:
        nowhere = {"exchange": "nowhere", "routing_key": "none"}
        unbound = {"exchange": "amq.direct", "routing_key": "none"}
        for to in (nowhere, unbound):
            headers = {"id": to["exchange"], "task": "any"}
            with letters(app) as kept:
                made = dead.message_of(message(headers=headers, delivery_info=to))
                kept.bury(headers, made, "poison", "none")
            app.backend.mark_as_failure(to["exchange"], ValueError("poison"))
            with pytest.raises(PublishError, match="was not sent"):
                send_again(app, to["exchange"])
            result = app.AsyncResult(to["exchange"])
            assert (result.state, str(result.result)) == ("FAILURE", "poison")
            the_letter(app, to["exchange"])


# What becomes a letter


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_a_task_that_has_used_up_its_retries_is_a_letter(
    pool: str, broker: str, valkey: Valkey
) -> None:
    with worker(broker, valkey, pool=pool) as here, client(broker, valkey) as app:
        queue = here.queue
        by_hand = here.send("give_up", "hand", headers={"own": "kept"}, priority=4)
        asked = here.send("give_up", "asked", 1)
        itself = here.send("give_up_by_itself", "itself")
        no_letters = [
            here.send(name) for name in ("fail_at_once", "never_again", "fail_in_the_end")
        ]
        for result in (by_hand, asked, itself, *no_letters):
            with pytest.raises((ConnectionError, ValueError)):
                result.get(timeout=30)
        for result, key, tries in (
            (by_hand, "hand", 3),
            (asked, "asked", 2),
            (itself, "itself", 2),
        ):
            letter, raw = the_letter(app, result.id)
            assert (letter.reason, letter.error) == ("retries", f"ConnectionError('{key}')")
            assert here.notes.lrange(f"note:{key}", 0, -1) == [
                b"%d" % each for each in range(tries)
            ]
            assert json.loads(raw)["headers"]["retries"] == 0
        headers = json.loads(the_letter(app, by_hand.id)[1])["headers"]
        assert headers["own"] == "kept"
        with letters(app) as kept:
            assert len(kept) == 3
        for key in ("hand", "asked", "itself"):
            here.notes.set(f"mended:{key}", 1)
        for result in (by_hand, asked, itself):
            send_again(app, result.id)
            eventually(here.client.AsyncResult(result.id).successful, what=here.process.output)
        assert here.queue == queue
        assert here.notes.lindex("note:hand", -1) == b"0"
        with letters(app) as kept:
            assert len(kept) == 0


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_a_last_attempt_waits_for_the_place_of_letters(
    pool: str, valkey: Valkey, tmp_path: Path
) -> None:
    empty_redis(valkey.celery_url)
    with Valkey(tmp_path) as queues, worker(queues.celery_url, valkey, pool=pool) as here:
        last = here.send("fail_later", 1, "last", retries=3)  # of Celery's usual three
        assert here.noted("last") == "started"
        queues.stop()
        eventually(last.failed)
        here.process.wait_for("a dead letter waits")
        queues.start()
        with client(queues.celery_url, valkey) as app:
            letter, _ = the_letter(app, last.id)
            assert (letter.reason, letter.error) == ("retries", "ConnectionError('last')")


def test_a_refused_message_waits_for_the_place_of_letters(valkey: Valkey, tmp_path: Path) -> None:
    broker = given("TEST_AMQP_URL")
    empty_redis(valkey.celery_url)
    with Valkey(tmp_path) as results, worker(broker, results, NOTES=valkey.celery_url) as here:
        before = here.send("wait", 0)
        assert before.get(timeout=20) == "waited"
        close_results(here.client.backend)
        results.stop()
        unheard: dict[str, Any] = {"ignore_result": True}  # or the client would wait as well
        unknown = here.send("newer", "any", **unheard).id
        invalid = here.send("wait", retries=-1, **unheard).id
        here.process.wait_for("a message waits", count=2)
        results.start()
        with client(broker, results) as app:
            assert the_letter(app, unknown)[0].reason == "unknown task"
            assert the_letter(app, invalid)[0].reason == "invalid"
            for task_id in (unknown, invalid):
                eventually(app.AsyncResult(task_id).failed)
        here.send("wait", 0, "after", **unheard)
        assert here.noted("after-ended", 30) == "returned"
        assert here.process.running
