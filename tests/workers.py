"""A worker of any pool on any broker, and a plain Celery app that sends to it."""

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from celery import Celery
from celery.backends.redis import RedisBackend
from redis import Redis

from celeriac.store import redis_url
from support import Process, clean_environment, close_results, eventually, python, wanted

APPS = Path(__file__).parent / "apps"
POOLS = {
    "prefork": ["-P", "prefork", "-c", "2"],
    "threads": ["-P", "threads", "-c", "8"],
    "solo": ["-P", "solo"],
    "celeriac": ["-c", "50"],
}
BROKERS = ["embedded", *wanted("redis", "TEST_REDIS_URL"), *wanted("rabbitmq", "TEST_AMQP_URL")]


class Worker:
    """A worker of `apps/<app>.py`, and a client without the library."""

    def __init__(
        self, app: str, pool: str, broker: str, backend: str, *options: str, **env: str
    ) -> None:
        self.app, self.pool = app, pool
        self.queue = f"{app}-{pool}-{os.getpid()}-{secrets.token_hex(3)}"
        self.notes = Redis.from_url(redis_url(env.get("NOTES", backend)))
        env |= {"BROKER": broker, "BACKEND": backend}
        if pool == "celeriac":
            env["WORKER_POOL"] = "celeriac.pool:TaskPool"
        command = ["-m", "celery", "-A", f"{app}.celery", "worker", "-l", "info", "-E"]
        command += ["-Q", self.queue, "-n", f"{self.queue}@%h", *POOLS[pool], *options]
        self.process: Process = python(*command, cwd=APPS, env=clean_environment(**env))
        self.client = Celery("client", broker=broker, backend=backend, set_as_current=False)
        self.client.conf.task_default_queue = self.queue
        self.client.conf.broker_pool_limit = 0  # no pool: nothing is left to close

    def wait_until_ready(self) -> Self:
        self.node = self.process.wait_for(r"(\S+@\S+) ready\.$")[1]
        return self

    def signature(self, name: str, *args: object, **options: object) -> Any:
        # The queue goes along: the worker sends what follows, and has another default.
        return self.client.signature(
            f"{self.app}.{name}", args, options={"queue": self.queue} | options
        )

    def send(self, name: str, *args: object, **options: Any) -> Any:
        return self.client.send_task(f"{self.app}.{name}", args, **options)

    def control(self, command: str, *, timeout: float = 5.0, **arguments: object) -> Any:
        """This worker's answer to a remote control command."""
        replies = self.client.control.broadcast(
            command, arguments=arguments, reply=True, timeout=timeout, limit=1,
            destination=[self.node],
        )  # fmt: skip
        assert replies, f"no answer to {command} in {timeout:g} s"
        return replies[0][self.node]

    def noted(self, key: str, timeout: float = 15.0) -> str:
        def found() -> bytes | None:
            value = self.notes.lpop(f"note:{key}")
            assert value is None or isinstance(value, bytes)
            return value

        return eventually(found, timeout, what=f"a note of {key}").decode()

    def close(self) -> None:
        self.process.stop()
        if isinstance(self.client.backend, RedisBackend):
            close_results(self.client.backend)
        self.notes.close()

    def __enter__(self) -> Self:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()
