"""Tasks that write down each of their runs, and some that take their worker down with them.

The environment is the whole configuration, as in a container. `STOCK` asks for plain Celery, and
`POOL` for a pool: Celery's command line reads CELERY_WORKER_POOL itself, and refuses ours.
"""

import asyncio
import mmap
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

from celery import Celery, Task
from celery.exceptions import Reject

from celeriac import Settings, create_celery
from celeriac.embedded import die_with_parent
from chaos.ledger import Ledger
from chaos.queues import queues

die_with_parent(int(os.environ["PARENT"]))  # a test that is killed leaves no worker
ledger = Ledger.open(os.environ["LEDGER"], os.environ["BOOK"])


def _options() -> dict[str, Any]:
    name = os.environ["CELERY_TASK_DEFAULT_QUEUE"]
    return {"worker_pool": os.environ["POOL"], **queues(name, os.environ)}


def _stock() -> Celery:
    app = Celery("stock", broker=os.environ["CELERY_BROKER_URL"])
    app.conf.update(_options() | Settings().celery_config())
    return app


celery: Any = _stock() if "STOCK" in os.environ else create_celery(Settings(), **_options())


@contextmanager
def written(task: Task, key: str) -> Iterator[None]:
    """The body's begin and, unless something ends it, its end."""
    run = uuid4().hex
    ledger.write(key, "begin", run, task.request.id)
    yield
    ledger.write(key, "end", run, task.request.id)


@celery.task(bind=True)
def work(self: Task, key: str, seconds: float = 0.0) -> str:
    with written(self, key):
        time.sleep(seconds)
    return key


if "STOCK" not in os.environ:

    @celery.task(bind=True)
    async def awork(self: Task, key: str, seconds: float = 0.0) -> str:
        with written(self, key):
            await asyncio.sleep(seconds)
        return key

    @celery.task(bind=True)
    async def block_loop(self: Task, key: str, seconds: float) -> str:
        with written(self, key):
            time.sleep(seconds)  # noqa: ASYNC251 (what it is there for)
        return key


@celery.task(bind=True)
def callback(self: Task, key: str) -> str:
    ledger.write(key, "callback", uuid4().hex, self.request.id)
    return key


@celery.task
def errback(request: Any, error: BaseException, traceback: object) -> None:
    """By its id: a request that somebody has from a dead worker has no arguments."""
    ledger.write("", "errback", uuid4().hex, request.id)


@celery.task(bind=True)
def gather(self: Task, results: list[str], key: str) -> str:
    with written(self, key):
        pass
    return f"{key} of {len(results)}"


@celery.task(bind=True)
def kill_worker(self: Task, key: str, how: str, times: int) -> str:
    """Ends its process the first `times` times that it runs."""
    earlier = sum(entry.key == key and entry.event == "begin" for entry in ledger.entries())
    with written(self, key):
        if earlier < times:
            END[how]()
    return key


def _exhaust_memory() -> None:
    """All that this process may have, which is little more than it has now."""
    with open("/proc/self/statm") as statistics:  # noqa: PTH123 (nothing may be imported here)
        size = int(statistics.read().split()[0]) * mmap.PAGESIZE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 256 * 2**20, hard))
    held = []
    try:
        for piece in (2**24, 2**20, 2**16):
            with suppress(MemoryError):
                while True:
                    held.append(bytes(piece))
        time.sleep(0.1)  # others have their turn, without any
        raise MemoryError
    finally:
        held.clear()
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


END = {
    "exit": lambda: os._exit(9),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": _exhaust_memory,
}


@celery.task(bind=True, time_limit=1)
def over_limit(self: Task, key: str, seconds: float) -> str:
    with written(self, key):
        time.sleep(seconds)
    return key


if "STOCK" not in os.environ:

    @celery.task(bind=True, time_limit=1)
    async def aover_limit(self: Task, key: str, seconds: float) -> str:
        with written(self, key):
            await asyncio.sleep(seconds)
        return key

    @celery.task(bind=True)
    async def swallow(self: Task, key: str, seconds: float) -> str:
        """Ends when it wants to, whatever it is told."""
        with written(self, key):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                with suppress(BaseException):
                    await asyncio.sleep(until - time.monotonic())
        return key


@celery.task(bind=True)
def give_back(self: Task, key: str) -> None:
    """For ever: only the broker's limit of deliveries ends it."""
    with written(self, key):
        time.sleep(0.05)
    raise Reject("for somebody else", requeue=True)
