"""Redis behind Sentinel: the transport and the results of a worker, through a failover."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from celeriac.embedded import Valkey
from support import Process, eventually, free_port, missing
from workers import Worker

MASTER = "main"
OPTIONS = {"master_name": MASTER, "socket_timeout": 2.0, "socket_connect_timeout": 2.0}
CONF = {
    "task_acks_late": True,
    "broker_transport_options": OPTIONS,
    "result_backend_transport_options": OPTIONS,
}


class Servers:
    """A master, a replica of it, and a sentinel that fails over after a second."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        program = shutil.which("redis-server") or missing("redis-server")
        self._program, self._folder, self._stack = program, folder, stack
        first, second, self.port = free_port(), free_port(), free_port()
        self.master = self._start("master", first)
        self._start("replica", second, "--replicaof", "127.0.0.1", str(first))
        with Redis(port=second) as replica:
            eventually(lambda: replica.info("replication")["master_link_status"] == "up")
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {first} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 1000\n"
            f"sentinel failover-timeout {MASTER} 3000\n"
        )
        sentinel = stack.enter_context(Process([program, config, "--sentinel"]))
        sentinel.wait_for("monitor master")
        with Redis(port=self.port) as client:
            eventually(lambda: client.sentinel_slaves(MASTER))
        self.url = f"sentinel://127.0.0.1:{self.port}/0"

    def _start(self, name: str, port: int, *options: str) -> Process:
        folder = self._folder / name
        folder.mkdir()
        command = [self._program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        server = self._stack.enter_context(Process([*command, "--save", "", *options]))
        server.wait_for("Ready to accept connections")
        return server


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path, stack)


@pytest.mark.parametrize("pool", ["celeriac", "prefork"])
def test_a_worker_goes_on_after_a_failover(pool: str, servers: Servers, valkey: Valkey) -> None:
    notes = valkey.celery_url
    worker = Worker(
        "pool_app", pool, servers.url, servers.url, CONF=json.dumps(CONF), NOTES=notes, LEASE="2"
    )
    worker.client.conf.update(CONF)
    try:
        worker.wait_until_ready()
        assert worker.send("wait", 0).get(timeout=20) == "waited"
        with Redis(port=servers.port) as sentinel:
            _, port = sentinel.sentinel_get_master_addr_by_name(MASTER)
        with Redis(port=port) as master:  # which only our transport and result backend write
            assert master.exists("celeriac:unacked:leases", "celeriac:runs:leases") == 2
        servers.master.stop()

        def runs_again() -> bool:
            try:
                return bool(worker.send("wait", 0, retry=False).get(timeout=2) == "waited")
            except Exception:  # while the replica is made the master
                return False

        eventually(runs_again, 40)
    finally:
        worker.close()
