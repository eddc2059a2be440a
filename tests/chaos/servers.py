"""Servers of our own that can be killed, paused and started again with what they held."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from celeriac.embedded import die_with_parent, find_server
from support import clean_environment, eventually, free_port


class Server(ABC):
    """One process in a group of its own, its data in `data`, on a port that it keeps."""

    patience = 15.0  # seconds to start

    def __init__(self, data: Path) -> None:
        self.data, self.port = data, free_port()
        self.data.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._spawn(*self._command(), env=self._environment())
        eventually(self.answers, self.patience, what=f"{type(self).__name__} to start")

    def _spawn(self, *command: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.data / "output.log").open("ab") as output:
            return subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - two system calls
            )

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _environment(self) -> dict[str, str]:
        return clean_environment()

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    @abstractmethod
    def url_at(self, port: int) -> str:
        """As Celery writes it, where `port` leads to this server."""

    @abstractmethod
    def answers(self) -> bool: ...

    def kill(self) -> None:
        """SIGKILL: what was not on disk is gone."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def recover(self) -> None:
        """Running and answering again, whatever a test has done to it."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        else:
            self.resume()
            eventually(self.answers, self.patience)

    def close(self) -> None:
        self.kill()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RedisServer(Server):
    """Redis or Valkey, as found, that has on disk what it has said yes to."""

    def _command(self) -> list[str]:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.data,
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [find_server(), *(str(part) for k, v in options.items() for part in (f"--{k}", v))]

    def url_at(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def client(self) -> "Redis":
        return Redis.from_url(
            self.url, socket_timeout=5, retry=Retry(NoBackoff(), 0), decode_responses=True
        )

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (RedisError, OSError):
            return False


class RabbitServer(Server):
    """A RabbitMQ node, with a port mapper of its own: nothing of the machine's is touched."""

    patience = 60.0

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self._mapper: subprocess.Popen[bytes] | None = None
        self._mapper_port, self._distribution_port = free_port(), free_port()
        self._cookie = secrets.token_hex(16)
        (data / "enabled_plugins").write_text("[].\n")

    @staticmethod
    def program() -> str | None:
        # Debian's on PATH changes to another user, and takes no configuration from here.
        packaged = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        if packaged.exists():
            return str(packaged)
        return shutil.which("rabbitmq-server")

    def _command(self) -> list[str]:
        program = self.program()
        assert program is not None
        return [program]

    def _environment(self) -> dict[str, str]:
        return clean_environment(
            HOME=str(self.data),
            ERL_EPMD_PORT=str(self._mapper_port),
            ERL_EPMD_ADDRESS="127.0.0.1",
            RABBITMQ_NODENAME=f"chaos{self.port}@localhost",
            RABBITMQ_NODE_IP_ADDRESS="127.0.0.1",
            RABBITMQ_NODE_PORT=str(self.port),
            RABBITMQ_DIST_PORT=str(self._distribution_port),
            RABBITMQ_ERLANG_COOKIE=self._cookie,
            RABBITMQ_MNESIA_BASE=str(self.data / "mnesia"),
            RABBITMQ_LOG_BASE=str(self.data),
            RABBITMQ_LOGS="-",
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self.data / "enabled_plugins"),
            RABBITMQ_CONF_ENV_FILE=str(self.data / "none"),
            RABBITMQ_CONFIG_FILE=str(self.data / "none"),
            RABBITMQ_PID_FILE=str(self.data / "pid"),
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +sbwt none",
            RUNNING_UNDER_SYSTEMD="1",  # the script becomes the node: its pid is ours to signal
        )

    def start(self) -> None:
        if self._mapper is None:
            mapper = shutil.which("epmd") or "epmd"
            port = str(self._mapper_port)
            self._mapper = self._spawn(mapper, "-port", port, env=self._environment())
        super().start()

    def url_at(self, port: int) -> str:
        return f"amqp://guest:guest@127.0.0.1:{port}//"

    def answers(self) -> bool:
        """It listens last of all, and greets whoever says what it speaks."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as probe:
                probe.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(probe.recv(1))
        except OSError:
            return False

    def close(self) -> None:
        super().close()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()
