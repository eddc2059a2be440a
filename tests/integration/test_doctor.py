"""What `celeriac doctor` tells of live services; each hazard present, and absent."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from celeriac.doctor import Finding, Patient, Severity, examine, rabbitmq, redis, workers
from celeriac.embedded import Valkey
from celeriac.rabbitmq import queue
from profiles import Profiled
from support import clean_environment, empty_redis, eventually, free_port, given, python, run_python
from workers import APPS

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
Check = Callable[[Patient], Iterator[Finding]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Redis]]:
    """The URL of a Redis of this test alone, and a client of it."""
    with Valkey(tmp_path) as started, Redis.from_url(started.redis_url) as client:
        yield started.celery_url, client


def look(check: Check, broker: str, backend: str = "disabled://", **options: Any) -> list[Finding]:
    app = Celery("examined", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(options)
    with Patient(app, None, None) as patient:
        findings = list(check(patient))
    assert all(each.what and each.remedy for each in findings)
    return findings


def severities(*args: Any, **options: Any) -> list[Severity]:
    return [each.severity for each in look(*args, **options)]


def send(client: Redis, command: str) -> None:
    execute: Any = client.execute_command
    execute(*command.split())


def test_a_redis_that_throws_keys_away(server: tuple[str, Redis]) -> None:
    url, client = server
    assert severities(redis.eviction, url) == []
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert severities(redis.eviction, url) == [WARNING]
    client.config_set("maxmemory", "100mb")
    assert severities(redis.eviction, url) == [ERROR]
    client.config_set("maxmemory-policy", "noeviction")
    assert severities(redis.eviction, url) == []
    client.config_set("maxmemory", client.info("memory")["used_memory"])
    assert severities(redis.eviction, url) == [WARNING]


def test_a_redis_that_forgets(server: tuple[str, Redis]) -> None:
    url, client = server
    assert severities(redis.persistence, url) == []
    client.config_set("appendonly", "no")
    assert severities(redis.persistence, url) == [ERROR]
    assert severities(redis.persistence, "memory://", url) == [WARNING]
    client.config_set("save", "60 1")
    assert severities(redis.persistence, url) == [WARNING]
    send(client, "ACL SETUSER default -info -config")
    (finding,) = look(redis.persistence, url)
    assert finding.severity == NOTE
    assert "could not look" in finding.what


def test_a_redis_that_is_a_replica(server: tuple[str, Redis]) -> None:
    url, client = server
    assert severities(redis.server_version, url) == []
    client.replicaof("127.0.0.1", str(free_port()))
    assert severities(redis.server_version, url) == [ERROR]


def test_a_redis_that_is_too_old(
    server: tuple[str, Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "_OLDEST", "99.0")
    assert severities(redis.server_version, server[0]) == [ERROR]


def test_another_clock(server: tuple[str, Redis], monkeypatch: pytest.MonkeyPatch) -> None:
    assert severities(redis.clock, server[0]) == []
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 60)
    (finding,) = look(redis.clock, server[0])
    assert finding.severity == WARNING
    assert "60 s ahead" in finding.what


def test_each_unreachable_service_has_its_cause_and_its_remedy(
    server: tuple[str, Redis],
) -> None:
    url, client = server
    assert severities(redis.reachable, url) == []
    send(client, "ACL SETUSER default resetpass >right")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hole = f"127.0.0.1:{silent.getsockname()[1]}"
        for check, broker, cause, remedy in (
            (redis.reachable, f"redis://127.0.0.1:{free_port()}/0", "refused", "start it"),
            (redis.reachable, f"redis://{hole}/0", "[Tt]imeout", "silent for 2 s"),
            (redis.reachable, "redis://nowhere.invalid/0", "known|resolution", "no such host"),
            (redis.reachable, url, "authenticat", "password"),
            (rabbitmq.reachable, f"amqp://127.0.0.1:{free_port()}//", "refused", "start it"),
            (rabbitmq.reachable, f"amqp://{hole}//", "timed out", "silent for 2 s"),
        ):
            (finding,) = look(check, broker)
            assert finding.severity == ERROR
            assert re.search(cause, finding.what), finding
            assert remedy in finding.remedy, finding


def test_rabbitmq_says_why_it_refuses() -> None:
    url = given("TEST_AMQP_URL")
    assert severities(rabbitmq.reachable, url) == []
    user, at, rest = url.removeprefix("amqp://").rpartition("@")
    (finding,) = look(rabbitmq.reachable, f"amqp://{user}-not:secret@{rest}")
    assert "user and password" in finding.remedy
    assert "secret" not in finding.what
    host = rest.partition("/")[0]
    (finding,) = look(rabbitmq.reachable, f"amqp://{user}{at}{host}/no-such-vhost")
    assert "add_vhost no-such-vhost" in finding.remedy


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Profiled]:
    empty_redis(valkey.celery_url)
    made = Profiled(given("TEST_AMQP_URL"), valkey.celery_url)
    yield made
    with made.app.connection_for_write() as connection:
        connection.default_channel.queue_delete(made.queue)
    made.close()


def test_rabbitmqs_queues(client: Profiled) -> None:
    def examined(check: Check = rabbitmq.queues) -> list[Severity]:
        with Patient(client.app, None, None) as patient:
            return [each.severity for each in check(patient)]

    assert examined() == [NOTE]  # not there yet, and looking made none
    assert examined() == [NOTE]
    with client.worker("-P", "solo"):
        assert examined() == examined(rabbitmq.server_version) == []
    assert examined() == [ERROR]  # nobody consumes it
    with client.app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_delete(client.queue)
        channel.queue_declare(client.queue, durable=True, auto_delete=False)
        assert examined() == [ERROR, ERROR]  # nor is it ours


def test_dead_letters_that_nobody_takes(client: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celeriac.rabbitmq.DEAD", client.queue)  # one of this test alone

    def found() -> list[Severity]:
        with Patient(client.app, None, None) as patient:
            return [each.severity for each in rabbitmq.dead_letters(patient)]

    assert found() == []
    with client.app.connection_for_write() as connection:
        connection.default_channel.queue_declare(client.queue, durable=True, auto_delete=False)
        assert found() == []
        connection.Producer().publish({}, exchange="", routing_key=client.queue)
        assert eventually(found) == [WARNING]


def test_tasks_that_rabbitmq_takes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    url = given("TEST_AMQP_URL")
    app = Celery("examined", broker=url, set_as_current=False)

    def examined(**options: Any) -> list[Severity]:
        app.conf.update(options)
        with Patient(app, None, None) as patient:
            return [each.severity for each in rabbitmq.consumer_timeout(patient)]

    @app.task(shared=False)
    def task() -> None: ...

    monkeypatch.setattr(rabbitmq, "_ask_for_timeout", lambda patient: 1800.0)
    assert examined() == []  # acknowledged before it runs
    app.conf.task_acks_late = True
    task.acks_late = True
    assert examined() == [NOTE]
    assert examined(task_time_limit=1700) == []
    assert examined(task_time_limit=1900) == [ERROR]
    monkeypatch.setattr(rabbitmq, "_ask_for_timeout", lambda patient: None)
    assert examined() == [NOTE, WARNING]
    monkeypatch.setattr(rabbitmq, "_ask_for_timeout", lambda patient: 0.0)
    assert examined() == []


def test_the_timeout_is_asked_of_rabbitmqs_command_line_or_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = Celery("examined", broker=given("TEST_AMQP_URL"), set_as_current=False)
    program = tmp_path / "rabbitmqctl"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def asked(answer: str) -> float | None:
        program.write_text(f"#!/bin/sh\n{answer}\n")
        with Patient(app, None, None) as patient:
            return rabbitmq._ask_for_timeout(patient)

    assert asked("echo '{ok,1800000}'") == 1800
    assert asked("echo undefined") == 0
    assert asked("echo no permission >&2; exit 1") is None
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with Patient(app, None, None) as patient:
        assert rabbitmq._ask_for_timeout(patient) is None


def test_queues_of_redis_that_no_worker_consumes(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    client = Profiled(valkey.celery_url, valkey.celery_url)
    other = f"{client.queue}-other"
    client.options["task_queues"] = [client.queue, other]
    client.app.conf.task_queues = [queue(name) for name in client.options["task_queues"]]

    def examined() -> list[Severity]:
        with Patient(client.app, None, None) as patient:
            return [each.severity for each in workers.consumers(patient)]

    try:
        assert examined() == [WARNING]  # no worker at all
        with client.worker("-P", "solo", "-Q", client.queue):  # on a loaded machine it may be late
            eventually(lambda: examined() == [ERROR])
        with client.worker("-P", "solo"):
            eventually(lambda: examined() == [])
    finally:
        client.close()


@pytest.mark.parametrize("login", [False, True])
def test_flower_without_a_login(valkey: Valkey, login: bool) -> None:
    empty_redis(valkey.celery_url)
    port = free_port()
    command = ["-m", "celery", "-A", "profile_app.celery", "flower", f"--port={port}"]
    command += ["--address=127.0.0.1", *(["--basic-auth=user:own"] if login else [])]
    env = clean_environment(BROKER=valkey.celery_url, BACKEND=valkey.celery_url)
    app = Celery("examined", broker=valkey.celery_url, set_as_current=False)

    def examined() -> list[Finding]:
        with Patient(app, None, f"http://127.0.0.1:{port}") as patient:
            return list(workers.flower(patient))

    assert [each.severity for each in examined()] == [NOTE]  # nobody is there
    with python(*command, cwd=APPS, env=env) as flower:
        flower.wait_for("Connected to|Visit me", 30)
        eventually(lambda: all(each.severity != NOTE for each in examined()))
        assert [each.severity for each in examined()] == ([] if login else [WARNING])


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "celeriac.cli", "doctor", "-A", "profile_app.celery", *arguments]
    return run_python(*command, cwd=APPS, env=clean_environment(**env), timeout=60)


def test_the_command_ends_with_1_where_there_is_an_error(server: tuple[str, Redis]) -> None:
    url, redis_client = server
    client = Profiled(url, url)
    env = client.services | {"OPTIONS": json.dumps(client.options)}
    with ExitStack() as stack:
        stack.callback(client.close)
        stack.enter_context(client.worker("-P", "solo"))
        eventually(lambda: examine(client.app) == [])
        healthy = run(**env)
        assert (healthy.returncode, healthy.stdout) == (0, "nothing found\n"), healthy
        redis_client.config_set("maxmemory", "100mb")
        redis_client.config_set("maxmemory-policy", "allkeys-lru")
        ill = run(**env)
        assert ill.returncode == 1
        assert ill.stdout.startswith("error   eviction: the broker and result backend")
        assert "→ CONFIG SET maxmemory-policy noeviction" in ill.stdout
        assert ill.stdout.splitlines()[-1] == "1 error"
        as_json = run("--json", **env)
        assert as_json.returncode == 1
        (finding,) = json.loads(as_json.stdout)
        assert (finding["severity"], finding["check"]) == ("error", "eviction")


def test_an_app_that_is_none_is_one_line(valkey: Valkey) -> None:
    for path in ("no_such.celery", "profile_app.notes"):
        found = run("-A", path, BROKER=valkey.celery_url, BACKEND=valkey.celery_url)
        assert found.returncode == 1
        assert found.stderr.startswith("error: ")
        assert "Traceback" not in found.stderr
