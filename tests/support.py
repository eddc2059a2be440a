"""What several test files need: processes, ports, services, and waiting for a condition."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import psycopg
import pytest
from redis import Redis
from sqlalchemy import make_url

from celeriac import records
from celeriac.store import redis_url

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "reference"
FIRST_STEPS = ROOT / "docs" / "tutorial" / "first_steps"
CI = os.environ.get("CI") == "true"

T = TypeVar("T")


def missing(what: str) -> NoReturn:
    """Something that a test needs is not on this machine: a failure in CI, a skip at home."""
    if CI:
        pytest.fail(f"CI needs {what}")
    pytest.skip(f"needs {what}")


def given(name: str) -> str:
    """A service's URL from TEST_…_URL."""
    return os.environ.get(name) or missing(f"{name} to be set")


def wanted(kind: str, name: str) -> list[str]:
    """`[kind]` as a fixture's parameter where the service is given, or has to be."""
    return [kind] if CI or os.environ.get(name) else []


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without anything that could point at somebody's servers."""
    names = r"CELERY_|REDIS_URL$|DATABASE_|FASTAPI_CONFIG$|WS_MESSAGE_QUEUE$|FLOWER_|MAILING_LIST_"
    kept = {k: v for k, v in os.environ.items() if not re.match(names, k)}
    return kept | {"PYTHONUNBUFFERED": "1"} | changes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def eventually(condition: Callable[[], T | None], timeout: float = 15.0, what: str = "") -> T:
    """What `condition` returns once it is true; for states that no event announces."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.02)


def empty_redis(celery_url: str) -> None:
    with Redis.from_url(redis_url(celery_url)) as client:
        client.flushdb()


def close_results(backend: Any) -> None:
    """Close what a Redis result backend has open, for good."""
    backend.result_consumer.stop()
    # Handles that live longer would open it again, to say that nobody waits for them any more.
    backend.remove_pending_result = lambda result: None
    backend.client.connection_pool.disconnect()
    if (book := records.book_of(backend.app)) is not None:
        book.close()


@contextmanager
def fresh_postgres_database(url: str) -> Iterator[str]:
    """A new database on the server at `url`, dropped at the end."""
    server = make_url(url)
    address = server.set(drivername="postgresql").render_as_string(hide_password=False)
    name = f"celeriac_test_{secrets.token_hex(6)}"
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


class Process:
    """A child process in a group of its own whose output can be waited for."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=dict(env) if env is not None else clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._output = bytearray()
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := os.read(self._process.stdout.fileno(), 65536):
            with self._grown:
                self._output += chunk
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    @property
    def output(self) -> str:
        return self._output.decode(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, pattern: str, timeout: float = 20.0, *, count: int = 1) -> re.Match[str]:
        """The `count`th match of `pattern` in what the process has written so far."""

        def found() -> re.Match[str] | None:
            matches = list(re.finditer(pattern, self.output, re.MULTILINE))
            return matches[count - 1] if len(matches) >= count else None

        deadline = time.monotonic() + timeout
        with self._grown:
            while (match := found()) is None:
                left = deadline - time.monotonic()
                if left <= 0 or not (self._reader.is_alive() or self._grown.wait(0.1)):
                    pytest.fail(f"no {pattern!r} in {timeout:g} s in:\n{self.output[-8000:]}")
                self._grown.wait(min(left, 0.5))
        return match

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 20.0) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout:g} s:\n{self.output[-8000:]}")

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, then SIGKILL for the whole group: nothing outlives the test."""
        if self.running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def python(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Process:
    return Process([sys.executable, *arguments], cwd=cwd, env=env)


def run_python(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=dict(env) if env is not None else clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
