"""Child processes: the server, producers, workers; what they use, and their end."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
from redis import Redis
from redis.exceptions import RedisError

from celeriac.embedded import die_with_parent, find_server

ROOT = Path(__file__).resolve().parent.parent


class RowError(Exception):
    """A row that gave no figure; the rest goes on."""


def bin_of(environment: str) -> Path:
    """The folder of programs of an environment: our own, or one of the peers'."""
    if environment == "main":
        return Path(sys.executable).parent
    return ROOT / ".venv-bench" / environment / "bin"


class Child:
    """A program in a session of its own, its output in a file."""

    def __init__(self, command: str, environment: str, log: Path, env: Mapping[str, str]) -> None:
        folder, self._log = bin_of(environment), log
        program, *arguments = shlex.split(command)
        path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
        # What is set for somebody's application does not reach the frameworks.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY_", "BENCH_"))}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(folder / program), *arguments],
                cwd=ROOT,
                env={**inherited, "PATH": path, "PYTHONPATH": str(ROOT), **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - two system calls
            )
        self._root = psutil.Process(self._process.pid)

    def _family(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds, user and system, of the process and its children, those that ended included."""
        total = 0.0
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def peak(self) -> float:
        """The most memory that was resident, in MB; of several processes, the sum of theirs."""
        total = 0
        for process in self._family():
            with suppress(FileNotFoundError, ProcessLookupError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        total += int(line.split()[1])
        return total / 1024

    def resident(self) -> float:
        """The memory of the process without its children that is resident now, in MB."""
        return float(self._root.memory_info().rss) / 2**20

    def addresses(self) -> set[str]:
        """Its ends of its TCP connections."""
        found = self._root.net_connections("tcp")
        return {f"{each.laddr.ip}:{each.laddr.port}" for each in found}

    def wait_for(
        self, condition: Callable[[], bool], timeout: float, what: str, every: float = 0.005
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                raise RowError(f"ended with {self._process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise RowError(f"no {what} in {timeout:g} s: {self.tail()}")
            time.sleep(every)

    def result(self, timeout: float) -> str:
        """The last line of a program that ends by itself."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RowError(f"not ended in {timeout:g} s: {self.tail()}") from None
        if code != 0:
            raise RowError(f"ended with {code}: {self.tail()}")
        return self.tail().splitlines()[-1]

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:].strip()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for all that it started."""
        if self._process.poll() is not None:
            return
        family = self._family()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the start time: never a stranger with the pid
        self._process.wait()


@contextmanager
def child(
    command: str, environment: str, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[Child]:
    started = Child(command, environment, log, env or {})
    try:
        yield started
    finally:
        started.stop()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a server of our own, on TCP since not every peer takes a socket's path.

    It keeps nothing on disk, so that no row pays for the writes of another.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"bind": "127.0.0.1", "port": f"{port}", "dir": f"{folder}", "appendonly": "no"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(
        [find_server(), *words, "--save", ""],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - two system calls
    )
    try:
        with Redis(port=port) as client:
            for attempt in range(200):
                try:
                    client.ping()
                    break
                except (RedisError, OSError):
                    if attempt == 199 or process.poll() is not None:
                        raise
                    time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)
