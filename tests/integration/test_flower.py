"""Flower, beside a worker of the pool for async tasks, and the events that it reads."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from celeriac.embedded import Valkey
from support import clean_environment, empty_redis, eventually, free_port, python
from workers import APPS, Worker


@pytest.fixture(scope="module")
def servers(valkey: Valkey) -> tuple[str, str]:
    empty_redis(valkey.celery_url)
    return valkey.celery_url, valkey.celery_url


@pytest.fixture(scope="module")
def flower(servers: tuple[str, str]) -> Iterator[httpx.Client]:
    """Started before the first task: it shows what is sent from then on."""
    broker, backend = servers
    port = free_port()
    env = clean_environment(BROKER=broker, BACKEND=backend, FLOWER_UNAUTHENTICATED_API="true")
    command = ("-m", "celery", "-A", "pool_app.celery", "flower", f"--port={port}")
    with (
        python(*command, "--address=127.0.0.1", cwd=APPS, env=env) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=20) as client,
    ):
        process.wait_for("Connected to ")
        yield client


@pytest.fixture(scope="module")
def worker(flower: httpx.Client, servers: tuple[str, str]) -> Iterator[Worker]:
    with Worker("pool_app", "celeriac", *servers, "-c", "20") as running:
        yield running


def shown(flower: httpx.Client, task_id: str, state: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        task: dict[str, Any] = flower.get("/tasks").json().get(task_id, {})
        return task if task.get("state") == state else None

    return eventually(found, what=f"{state} of {task_id} in Flower")


def test_flower_shows_the_worker_and_its_pool(flower: httpx.Client, worker: Worker) -> None:
    def seen() -> dict[str, Any] | None:
        query = {"refresh": "1", "workername": worker.node}
        found: dict[str, Any] = flower.get("/workers", params=query).json().get(worker.node, {})
        return found if {"stats", "registered", "active_queues"} <= found.keys() else None

    found = eventually(seen, what="the worker in Flower, with what it answers")
    pool = found["stats"]["pool"]
    assert pool["implementation"] == "celeriac.pool:TaskPool"
    assert pool["max-concurrency"] == 20
    assert pool["processes"] == [worker.process.pid]
    assert "pool_app.wait" in found["registered"]
    assert worker.queue in [queue["name"] for queue in found["active_queues"]]


def test_flower_lists_the_tasks_with_names_and_states(flower: httpx.Client, worker: Worker) -> None:
    running = worker.send("wait", 20, "flower")
    worker.noted("flower-started")
    assert shown(flower, running.id, "STARTED")["name"] == "pool_app.wait"
    active = flower.get("/workers", params={"refresh": "1", "workername": worker.node}).json()
    assert running.id in [task["id"] for task in active[worker.node]["active"]]
    done, blocked = worker.send("wait", 0), worker.send("block", 0)
    failed, limited = worker.send("wait", "no number", "failed"), worker.send("hard")
    assert shown(flower, done.id, "SUCCESS")["result"] == "'waited'"
    assert shown(flower, blocked.id, "SUCCESS")["name"] == "pool_app.block"
    assert shown(flower, failed.id, "FAILURE")["exception"].startswith("TypeError(")
    assert "TimeLimitExceeded" in shown(flower, limited.id, "FAILURE")["traceback"]
    assert shown(flower, running.id, "STARTED")["worker"] == worker.node
    running.revoke(terminate=True)


def test_flower_ends_a_task_and_grows_the_pool(flower: httpx.Client, worker: Worker) -> None:
    task = worker.send("wait", 30, "ended")
    worker.noted("ended-started")
    flower.post(f"/task/revoke/{task.id}", params={"terminate": "true"}).raise_for_status()
    assert worker.noted("ended-ended") == "CancelledError"
    assert shown(flower, task.id, "REVOKED")["name"] == "pool_app.wait"
    flower.post(f"/worker/pool/grow/{worker.node}", params={"n": 5}).raise_for_status()
    eventually(lambda: worker.control("stats")["pool"]["max-concurrency"] == 25)


def test_a_busy_worker_sends_the_events_of_many_tasks_at_once(worker: Worker) -> None:
    sent: set[str] = set()
    batches: list[list[dict[str, Any]]] = []

    def receive(body: Any, _: object) -> None:
        events = body if isinstance(body, list) else [body]
        batches.append([each for each in events if each.get("uuid") in sent])

    def told() -> Counter[str]:
        return Counter(each["type"] for batch in batches for each in batch)

    with worker.client.connection() as connection:
        receiver = worker.client.events.Receiver(connection, accept=["json"])
        options = {"callbacks": [receive], "no_ack": True, "accept": ["json"]}
        with connection.Consumer(receiver.queue, **options):
            worker.control("cancel_consumer", queue=worker.queue)
            sent |= {worker.send("wait", 0).id for _ in range(100)}
            worker.control("add_consumer", queue=worker.queue)
            while told() != dict.fromkeys(("task-received", "task-started", "task-succeeded"), 100):
                connection.drain_events(timeout=10)
    assert max(map(len, batches)) > 24  # Celery's
