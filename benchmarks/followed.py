"""One row, once: a web process, a worker, and a client that is told how the tasks end."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redis import Redis

from benchmarks.follower import OPEN
from benchmarks.measure import Figures
from benchmarks.process import Child, child
from benchmarks.rows import Row

START = 30.0  # seconds until a web process answers, at most
END = 120.0  # and until a client has been told everything
HINTS = 4.5  # seconds until whoever waits has been told that there is no worker
QUIET = 0.02  # seconds of CPU in half a second: what a web process uses that only waits
_SITE = "--loop uvloop --http httptools --log-level warning --backlog 4096"


def told(row: Row, redis: str, folder: Path, *, count: int) -> Figures:
    """From the end of a body to the frame that tells of it, with little else to do.

    The CPU is that of the worker and the web process, for a task from its start to its end.
    """
    count = max(1, round(count * row.share))
    env = _emptied(row, redis)
    with _site(row, folder, env) as (site, port), _worker(row, redis, folder, env) as worker:
        arguments = f"{row.framework.app} {row.task} {port}"
        with _client(row, f"{row.client} {arguments} 2", folder, env) as first:
            first.result(END)  # until both have started
        used = worker.cpu() + site.cpu()
        with _client(row, f"{row.client} {arguments} {count}", folder, env) as client:
            figures: Figures = json.loads(client.result(END))
        return {**figures, "cpu_us": (worker.cpu() + site.cpu() - used) / count * 1e6}


def crowded(row: Row, redis: str, folder: Path, *, count: int) -> Figures:
    """So many sockets in one web process, each following a task; then a worker begins them.

    Memory is what the process has more of than before, once all are open and it is quiet. The CPU
    is the web process's, from when the worker starts. Without a worker there are only the sockets.
    """
    count = max(1, round(count * row.share))
    env = _emptied(row, redis)
    with _site(row, folder, env) as (site, port):
        arguments = f"crowd {row.framework.app} {row.task} {port}"
        with _client(row, f"{arguments} 20", folder, env) as few:
            few.wait_for(lambda: OPEN in few.tail(), START, "open sockets")
        _rest(site)  # what is made with the first sockets counts for none
        before = site.resident()
        with _client(row, f"{arguments} {count}", folder, env) as client:
            client.wait_for(lambda: OPEN in client.tail(), END, "open sockets")
            time.sleep(HINTS)
            _rest(site)
            figures: Figures = {"tasks": count}
            figures["socket_kb"] = (site.resident() - before) * 1024 / count
            connections = _connections(site, redis)
            figures["redis_connections"] = len(connections)
            figures["redis_subscribed"] = sum(each["sub"] != "0" for each in connections)
            if row.command:
                used = site.cpu()
                with _worker(row, redis, folder, env):
                    figures |= json.loads(client.result(END))
                figures["cpu_us"] = (site.cpu() - used) / count * 1e6
            figures["peak_mb"] = site.peak()
    return figures


def _emptied(row: Row, redis: str) -> dict[str, str]:
    with Redis.from_url(redis) as client:
        client.flushdb()
    return {"BENCH_REDIS_URL": redis, **row.env}


@contextmanager
def _site(row: Row, folder: Path, env: dict[str, str]) -> Iterator[tuple[Child, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    command = f"uvicorn benchmarks.apps.{row.web}:web --port {port} {_SITE} {row.site}"
    with child(command, row.framework.environment, folder / "site.log", env) as site:
        site.wait_for(answers, START, "answer", every=0.05)
        yield site, port


@contextmanager
def _worker(row: Row, redis: str, folder: Path, env: dict[str, str]) -> Iterator[Child]:
    command = row.command.replace("{redis}", redis)
    with child(command, row.framework.environment, folder / "log", env) as worker:
        yield worker


@contextmanager
def _client(row: Row, arguments: str, folder: Path, env: dict[str, str]) -> Iterator[Child]:
    command = f"python -m benchmarks.follower {arguments}"
    with child(command, row.framework.environment, folder / "client.log", env) as client:
        yield client


def _rest(site: Child) -> None:
    """Wait until it has nothing more to do."""
    used = site.cpu()
    for _ in range(20):
        time.sleep(0.5)
        used, before = site.cpu(), used
        if used - before <= QUIET:
            return


def _connections(site: Child, redis: str) -> list[dict[str, str]]:
    """Those of a process to its Redis, as that sees them."""
    with Redis.from_url(redis) as client:
        own = site.addresses()
        return [each for each in client.client_list() if each["addr"] in own]
