"""One row, once: a queue that is worked off, or a process that publishes."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis

from benchmarks.process import RowError, child
from benchmarks.rows import Row

START = 30.0  # seconds until a worker begins its first task, at most
END = 180.0  # and until its last result is stored

Figures = dict[str, float]


def worked_off(row: Row, redis: str, folder: Path, *, count: int, argument: object) -> Figures:
    """Fill the queue, start the worker, and measure from the first body to the last result.

    Filled by the framework's own publisher, in a process of its own. A worker's start does not
    count; its first few milliseconds of work are not seen, whose tasks do.
    """
    count = max(1, round(count * row.share))
    ticks = folder / "ticks"
    ticks.unlink(missing_ok=True)
    env = {"BENCH_REDIS_URL": redis, "BENCH_TICKS": str(ticks), **row.env}

    def passed() -> int:
        return ticks.stat().st_size if ticks.exists() else 0

    with Redis.from_url(redis) as client:
        client.flushdb()
        sender = f"{row.framework.app} {row.framework.fill} {row.task}"
        _produce(row, f"fill {sender} {json.dumps(argument)} {count}", folder, env)
        command = row.command.replace("{redis}", redis)
        with child(command, row.framework.environment, folder / "log", env) as worker:
            worker.wait_for(lambda: passed() > 0, START, "first task")
            start, used, server = time.perf_counter(), worker.cpu(), _server_cpu(client)
            worker.wait_for(lambda: passed() >= 2 * count, END, "last task")
            stored = partial(_all_stored, row, client, count)
            worker.wait_for(stored, END, "last result", every=0.02)  # a look is work for the server
            seconds, used = time.perf_counter() - start, worker.cpu() - used
            server = _server_cpu(client) - server
            return {
                "tasks": count,
                "seconds": seconds,
                "tasks_per_second": count / seconds,
                "cpu_us": used / count * 1e6,
                "server_us": server / count * 1e6,
                "peak_mb": worker.peak(),
            }


def _server_cpu(client: Redis) -> float:
    info: Any = client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


def _all_stored(row: Row, client: Redis, count: int) -> bool:
    return row.framework.left(client, count) <= 0


def published(row: Row, redis: str, folder: Path, *, count: int, mode: str) -> Figures:
    with Redis.from_url(redis) as client:
        client.flushdb()
    command = f"{mode} {row.framework.app} {row.sender} {count}"
    return _produce(row, command, folder, {"BENCH_REDIS_URL": redis, **row.env})


def committed(row: Row, redis: str, folder: Path, *, count: int, database: str) -> Figures:
    """Units of work of 50 concurrent handlers: a row, most with a message, committed."""
    url = f"sqlite:///{folder / 'bench.sqlite3'}"
    if database == "postgresql":
        url = os.environ.get("TEST_DATABASE_URL", "")
        if not url:
            raise RowError("TEST_DATABASE_URL names no PostgreSQL")
    with Redis.from_url(redis) as client:
        client.flushdb()
    command = f"handlers {row.framework.app} {row.sender} {count}"
    return _produce(row, command, folder, {"BENCH_REDIS_URL": redis, "BENCH_DATABASE_URL": url})


def _produce(row: Row, arguments: str, folder: Path, env: dict[str, str]) -> Figures:
    command = f"python -m benchmarks.producer {arguments}"
    with child(command, row.framework.environment, folder / "producer.log", env) as producer:
        figures: Figures = json.loads(producer.result(END))
    return figures


def answered(row: Row, redis: str, folder: Path, *, count: int) -> Figures:
    """A client that waits for each task before it sends the next, and a worker that has no other.

    The worker's CPU is that of a task that comes alone.
    """
    env = {"BENCH_REDIS_URL": redis, "BENCH_TICKS": str(folder / "ticks"), **row.env}
    with Redis.from_url(redis) as client:
        client.flushdb()
    command = row.command.replace("{redis}", redis)
    with child(command, row.framework.environment, folder / "log", env) as worker:
        mode = f"latency {row.framework.app} {row.task}"
        _produce(row, f"{mode} 1", folder, env)  # until it has started
        used = worker.cpu()
        figures = _produce(row, f"{mode} {count}", folder, env)
        return {**figures, "cpu_us": (worker.cpu() - used) / count * 1e6, "peak_mb": worker.peak()}
