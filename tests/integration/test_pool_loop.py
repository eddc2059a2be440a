"""The pool's event loop: of which kind it is, and what goes on while a body blocks it."""

import json
from pathlib import Path

import pytest

from celeriac.embedded import Valkey
from support import given
from workers import Worker


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_the_pool_runs_on_either_kind_of_loop(kind: str, valkey: Valkey, tmp_path: Path) -> None:
    if kind == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')")
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", "celeriac", *urls, PYTHONPATH=str(tmp_path)) as worker:
        assert worker.send("kind_of_loop").get(timeout=10).partition(".")[0] == kind
        sent = [worker.send("wait", 0.1) for _ in range(20)]
        sent += [worker.send("block", 0) for _ in range(5)]
        results = [result.get(timeout=30) for result in sent]
        assert results == ["waited"] * 20 + ["blocked"] * 5
        for child in worker.send("send_on", 2).get(timeout=10):
            assert worker.client.AsyncResult(child).get(timeout=10) == "waited"
        assert worker.send("retry_three_times").get(timeout=10) == 3
        assert worker.send("soft").get(timeout=10) == "in time"
        doomed = worker.send("wait", 30, "doomed")
        worker.noted("doomed-started")
        doomed.revoke(terminate=True)
        assert worker.noted("doomed-ended") == "CancelledError"


def test_a_body_that_blocks_the_loop_does_not_lose_the_broker(valkey: Valkey) -> None:
    broker = given("TEST_AMQP_URL")
    conf = json.dumps({"broker_heartbeat": 3, "task_acks_late": True})
    with Worker("pool_app", "celeriac", broker, valkey.celery_url, CONF=conf) as worker:
        so_far = len(worker.process.output)
        # RabbitMQ closes the connection of a client that is silent for three heartbeats.
        blocking, waiting = worker.send("block_loop", 12), worker.send("wait", 0)
        assert blocking.get(timeout=30) == "blocked"
        assert waiting.get(timeout=30) == "waited"
        assert (
            worker.send("wait", 0).get(timeout=30) == "waited"
        )  # over the connection that is left
        said = worker.process.output[so_far:]
        assert "has blocked the event loop" in said
        assert "onnection to broker lost" not in said
        assert said.count(f"block_loop[{blocking.id}] received") == 1
