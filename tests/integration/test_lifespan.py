"""What every worker process opens before its first task and closes after its last."""

import json
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from celery import Celery

from celeriac.embedded import Valkey
from support import ROOT, clean_environment, empty_redis, python
from workers import POOLS, Worker


@pytest.fixture(params=list(POOLS))
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_each_worker_process_enters_it_before_its_first_task_and_leaves_it_after_its_last(
    pool: str, valkey: Valkey
) -> None:
    empty_redis(valkey.celery_url)
    with Worker("pool_app", pool, valkey.celery_url, valkey.celery_url, LIFESPAN="1") as worker:
        processes = 2 if pool == "prefork" else 1
        entered = dict(worker.noted("lifespan").split()[1:] for _ in range(processes))
        for _ in range(10):
            process, loop = worker.send("loop_of_this_process").get(timeout=10)
            assert entered[str(process)] == str(loop)
        worker.process.signal(signal.SIGTERM)
        assert worker.process.wait() == 0
        assert {worker.noted("lifespan") for _ in entered} == {f"left {pid}" for pid in entered}


def test_a_lifespan_that_fails_ends_the_worker_with_its_reason(pool: str, valkey: Valkey) -> None:
    worker = Worker(
        "pool_app", pool, valkey.celery_url, valkey.celery_url,
        LIFESPAN="1", FAIL_AT_START="no database here",
    )  # fmt: skip
    try:
        assert worker.process.wait(timeout=30) not in (0, -signal.SIGKILL)
        worker.process.wait_for(r"CRITICAL.*lifespan failed: RuntimeError\('no database here'\)")
        assert " ready." not in worker.process.output or pool == "prefork"
    finally:
        worker.close()


def test_processes_that_are_spawned_are_refused_at_start(valkey: Valkey) -> None:
    conf = json.dumps({"worker_pool_start_method": "spawn"})
    urls = valkey.celery_url, valkey.celery_url
    worker = Worker("pool_app", "prefork", *urls, LIFESPAN="1", CONF=conf)
    try:
        assert worker.process.wait(timeout=30) == 1
        worker.process.wait_for(r'CRITICAL.*leave worker_pool_start_method at "fork"')
    finally:
        worker.close()


def test_a_cold_shutdown_leaves_it_too(valkey: Valkey) -> None:
    empty_redis(valkey.celery_url)
    urls = valkey.celery_url, valkey.celery_url
    with Worker("pool_app", "celeriac", *urls, LIFESPAN="1") as worker:
        process = worker.noted("lifespan").split()[1]
        worker.process.signal(signal.SIGQUIT)
        worker.process.wait()
        assert worker.noted("lifespan") == f"left {process}"


@pytest.fixture
def web_server() -> Iterator[tuple[str, set[int]]]:
    """Its address, and the ports from which it was called."""
    callers: set[int] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            callers.add(self.client_address[1])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", callers
        server.shutdown()
        thread.join()


def test_the_documented_example_shares_its_client_and_its_connections(
    valkey: Valkey, web_server: tuple[str, set[int]]
) -> None:
    address, callers = web_server
    folder = ROOT / "docs" / "howto" / "lifespan"
    assert (folder / "main.py").read_text() in folder.with_suffix(".md").read_text()
    empty_redis(valkey.celery_url)
    client = Celery("client", broker=valkey.celery_url, backend=valkey.celery_url)
    client.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    env = clean_environment(REDIS_URL=valkey.celery_url)
    command = ("-m", "celery", "-A", "main.celery", "worker", "--loglevel=info")
    with python(*command, cwd=folder, env=env) as worker:
        worker.wait_for(r"ready\.$")
        for _ in range(5):
            assert client.send_task("main.fetch", (address,)).get(timeout=10) == 204
        assert len(callers) == 1
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    client.backend.result_consumer.stop()
    client.backend.client.connection_pool.disconnect()
