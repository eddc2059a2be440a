"""An app of `create_celery` in this process, and workers of the same app."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from redis import Redis

from celeriac import Settings, create_celery
from celeriac.store import redis_url
from support import Process, clean_environment, close_results, eventually, python
from workers import APPS


def _known(*args: object) -> None:
    """The client knows the task's name, not its body."""


class Profiled:
    """A client made by `create_celery` that sends to queues of its own."""

    def __init__(self, broker: str, backend: str, **options: Any) -> None:
        self.queue = f"profile-{secrets.token_hex(4)}"
        self.arguments: list[str] = []  # of its workers
        self.limited: Any = None  # another queue
        self.options: dict[str, Any] = {"task_default_queue": self.queue} | options
        self.services = {"BROKER": broker, "BACKEND": backend}
        settings = Settings(celery_broker_url=broker, celery_result_backend=backend)
        self.app: Celery = create_celery(settings, broker_pool_limit=0, **self.options)
        self.notes = Redis.from_url(redis_url(backend))
        for name in ("note", "again", "slow", "failed"):
            self.app.task(name=f"profile_app.{name}", shared=False)(_known)

    def send(self, name: str, *args: object, **options: object) -> Any:
        return self.app.signature(f"profile_app.{name}", args).apply_async(**options)

    def control(self, command: str) -> dict[str, Any]:
        """The answer of each of its workers."""
        replies = self.app.control.broadcast(command, reply=True, timeout=10, limit=1)
        return {node: answer for each in replies for node, answer in each.items()}

    def noted(self, key: str, count: int, timeout: float = 20.0) -> list[float]:
        """The times of `count` runs."""
        eventually(lambda: self.notes.llen(f"note:{key}") >= count, timeout, f"{count} of {key}")
        return [float(each) for each in self.notes.lrange(f"note:{key}", 0, -1)]

    def start(self, *arguments: str, **env: str) -> Process:
        env |= self.services | {"OPTIONS": json.dumps(self.options)}
        command = ["-m", "celery", "-A", "profile_app.celery", "worker", "-l", "info"]
        command += ["-n", f"{self.queue}@%h", *arguments]
        return python(*command, cwd=APPS, env=clean_environment(**env))

    @contextmanager
    def worker(self, *arguments: str, **env: str) -> Iterator[Process]:
        with self.start(*arguments, **env) as process:
            process.wait_for(r" ready\.$", 30)
            yield process

    def close(self) -> None:
        close_results(self.app.backend)
        self.notes.close()
