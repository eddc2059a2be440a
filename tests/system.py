"""The reference system, started as a newcomer does: `./run dev`."""

import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import urlencode

import httpx
import psutil
from celery import Celery
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from celeriac import adopt
from support import REFERENCE, ROOT, Process, close_results, free_port, is_free, python


class System:
    """A running reference system and what talks to it."""

    def __init__(self, data: Path, port: int, env: Mapping[str, str]) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.sockets = f"ws://127.0.0.1:{port}"
        self.flower = f"http://127.0.0.1:{port - 8010 + 5557}"
        self.mailing_list = f"http://127.0.0.1:{port + 1000}"
        self._data, self._env = data, env
        command = [str(ROOT / "run"), "dev", "--port", str(port), "--data", str(data)]
        self.runner = Process([*command, "--no-reload"], env=env)
        self.http = httpx.Client(base_url=self.base, timeout=10)
        self.third_party = httpx.Client(base_url=self.mailing_list, timeout=10)

    def wait_until_ready(self) -> None:
        self.runner.wait_for(r"^celeriac +\| +web +http\S+ +ready", timeout=60)

    @property
    def env(self) -> dict[str, str]:
        """What another shell needs to join in: the file that the runner writes for it."""
        exported = dict(self._env)
        for line in (self._data / "env").read_text().splitlines():
            for word in shlex.split(line.removeprefix("export "), comments=True):
                name, _, value = word.partition("=")
                exported[name] = value
        return exported

    @cached_property
    def producer(self) -> Celery:
        """A Celery app of somebody else's that sends to this system."""
        env = self.env
        app = Celery(
            "producer",
            broker=env["CELERY_BROKER_URL"],
            backend=env["CELERY_RESULT_BACKEND"],
            set_as_current=False,
        )
        app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
        return adopt(app)

    @property
    def on_rabbitmq(self) -> bool:
        return self.env["CELERY_BROKER_URL"].startswith("amqp")

    def send(self, name: str, *args: object, **options: object) -> str:
        """Send the task to the queue that its name says; its id."""
        queue, colon, _ = name.partition(":")
        queue = queue if colon else "default"
        if self.on_rabbitmq:
            # Without a declaration: the producer's would be of another queue than the system's.
            options |= {"exchange": "celeriac", "routing_key": queue}
        else:
            options["queue"] = queue
        result = self.producer.send_task(name, args, ignore_result=None, **options)
        task_id: str = result.id
        return task_id

    def shell(self, *arguments: str) -> Process:
        """`python ARGUMENTS` in the project's folder, against this system."""
        return python(*arguments, cwd=REFERENCE, env=self.env)

    def celery(self, *arguments: str) -> Process:
        return self.shell("-m", "celery", "-A", "main.celery", *arguments)

    def watch(self, task_id: str, origin: str | None = None, **query: object) -> ClientConnection:
        """A WebSocket of the same visitor as `http`."""
        cookie = "; ".join(f"{name}={each}" for name, each in self.http.cookies.items())
        return connect(
            f"{self.sockets}/ws/task_status/{task_id}?{urlencode(query)}",
            origin=Origin(origin) if origin else None,
            additional_headers={"Cookie": cookie} if cookie else {},
            close_timeout=2,
        )

    def behave(self, **behaviour: float) -> None:
        """Make the third party behave so, and forget its calls."""
        self.third_party.put("/behaviour", json={"delay": 0} | behaviour).raise_for_status()
        self.third_party.delete("/calls").raise_for_status()

    def web(self) -> psutil.Process:
        """The process that serves the pages."""
        for process in psutil.Process(self.runner.pid).children(recursive=True):
            command = process.cmdline()
            if "uvicorn" in command and "main:app" in command:
                return process
        raise AssertionError("no web process")

    def close(self) -> None:
        self.http.close()
        self.third_party.close()
        if "producer" in self.__dict__:
            close_results(self.producer.backend)
        self.runner.stop()


def free_base_port() -> int:
    """A port such that those of the other processes, shifted with it, are free too."""
    while True:
        port = free_port()
        if 9010 < port < 60000 and is_free(port + 1000) and is_free(port - 8010 + 5557):
            return port
