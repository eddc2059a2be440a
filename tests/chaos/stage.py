"""What a scenario plays on: a broker, results, workers, a client, the ledger of what they did."""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

import pytest
from celery import Celery
from redis import Redis

from celeriac import Settings, create_celery
from celeriac.dead import Letter, letters
from celeriac.lease import execute
from celeriac.store import redis_url
from chaos.ledger import Entry, Ledger, Run, runs
from chaos.queues import queues
from support import ROOT, Process, clean_environment, close_results, python, wanted

LONG = "CHAOS_LONG" in os.environ  # `./run chaos`
BROKERS = ["redis", *(["rabbitmq"] if LONG else wanted("rabbitmq", "TEST_AMQP_URL"))]
POOLS = {"celeriac": "celeriac.pool:TaskPool", "prefork": "prefork", "threads": "threads"}
LEASE = 2.0  # seconds
RECOVERY = LEASE + 5.0  # within which a dead worker's tasks have to be in other hands
ENDED = {"SUCCESS", "FAILURE", "REVOKED"}


def cast(*short: tuple[str, str]) -> pytest.MarkDecorator:
    """Brokers and pools to play with: every one, or these in the short version."""
    found = (
        list(product(BROKERS, POOLS)) if LONG else [each for each in short if each[0] in BROKERS]
    )
    return pytest.mark.parametrize(("broker", "pool"), found, indirect=["broker"])


def count(*, short: int, long: int) -> int:
    """How many of something: the long version's are those of the promise."""
    return long if LONG else short


@dataclass
class Worker:
    """One place in the crew, whoever fills it: who replaces a worker has its name and settings."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    process: Process
    revived: bool = False  # by the stage, when it ends
    former: list[Process] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self) -> Self:
        self.process.wait_for(r"\S+@\S+ ready\.$", 30)
        return self

    def kill(self) -> float:
        """SIGKILL of the worker, not of its children; when that was."""
        at = time.time()
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()
        return at

    def replace(self) -> None:
        self.former.append(self.process)
        self.process = self.spawn()

    def spawn(self) -> Process:
        return python(*self.command, cwd=ROOT / "tests" / "apps", env=self.env)

    def family(self) -> set[int]:
        """The pids of the worker and its children."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.pid).children(recursive=True)
            return {self.pid, *(child.pid for child in children)}
        return {self.pid}


class Stage:
    """Everything of one scenario; what it starts ends with it."""

    def __init__(
        self,
        broker: str,
        backend: str,
        ledger: str,
        *,
        store: str | None = None,
        visibility_timeout: float | None = None,
        **env: str,
    ) -> None:
        self.broker, self.backend = broker, backend
        self.token = f"chaos-{os.getpid()}-{secrets.token_hex(3)}"
        self.ledger = Ledger.open(ledger, self.token)
        self.workers: list[Worker] = []
        self.options = {}
        if visibility_timeout is not None and broker.startswith("redis"):
            self.options["visibility_timeout"] = visibility_timeout
        self.env = {
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": backend,
            "CELERY_BROKER_TRANSPORT_OPTIONS": json.dumps(self.options),
            "WORKER_LEASE": str(LEASE),
            "CELERY_TASK_DEFAULT_QUEUE": self.token,
            "CELERY_WORKER_LOST_WAIT": "1",
            "LEDGER": ledger,
            "BOOK": self.token,
            "PARENT": str(os.getpid()),
            "PYTHONPATH": str(ROOT / "tests"),
        } | env  # fmt: skip
        self.client: Any = self._client(broker, backend)
        # The way to the results that no test blocks.
        self.results = Redis.from_url(redis_url(store or backend), socket_timeout=5)
        self._ending = threading.Event()
        self._reviver = threading.Thread(target=self._revive, name="reviver", daemon=True)
        self._reviver.start()

    def _client(self, broker: str, backend: str) -> Celery:
        settings = Settings(celery_broker_url=broker, celery_result_backend=backend)
        return create_celery(
            settings,
            name="client",
            task_default_queue=self.token,
            broker_transport_options=self.options,
            **queues(self.token, self.env),
        )

    # Workers.

    def worker(
        self,
        pool: str = "celeriac",
        concurrency: int = 4,
        *,
        late: bool = True,
        revived: bool = False,
        options: Iterable[str] = (),
        **env: str,
    ) -> Worker:
        """Start one; `wait_until_ready` is the caller's."""
        name = f"w{len(self.workers)}-{self.token}"
        environment = clean_environment(
            **self.env,
            POOL=POOLS[pool],
            CELERY_TASK_ACKS_LATE=str(int(late)),
            CELERY_TASK_REJECT_ON_WORKER_LOST=str(int(late)),
            **env,
        )
        command = ["-m", "celery", "-A", "chaos_app.celery", "worker", "-l", "info"]
        command += ["--without-mingle"]  # a second less to start
        command += ["-n", f"{name}@%h", "-c", str(concurrency), *options]
        worker = Worker(name, command, environment, process=None)  # type: ignore[arg-type]
        worker.process = worker.spawn()
        worker.revived = revived
        self.workers.append(worker)
        return worker

    def crew(self, size: int, *args: Any, **options: Any) -> list[Worker]:
        """Several workers, ready."""
        started = [self.worker(*args, **options) for _ in range(size)]
        return [worker.wait_until_ready() for worker in started]

    def _revive(self) -> None:
        while not self._ending.wait(0.1):
            for worker in list(self.workers):
                if worker.revived and not worker.process.running:
                    worker.replace()

    # What is sent.

    def signature(
        self, name: str, *args: object, kwargs: dict[str, Any] | None = None, **options: object
    ) -> Any:
        return self.client.signature(f"chaos_app.{name}", args, kwargs, options)

    def send(self, name: str, *args: object, **options: Any) -> str:
        """The id of a message that the broker has accepted."""
        sent: str = self.client.send_task(f"chaos_app.{name}", args, **options).id
        return sent

    # What became of it.

    def entries(self, event: str = "") -> list[Entry]:
        return [entry for entry in self.ledger.entries() if event in ("", entry.event)]

    def runs(self) -> dict[str, list[Run]]:
        return runs(self.ledger.entries())

    def written(self, event: str, keys: Collection[str], timeout: float = 30.0) -> None:
        """Wait until `event` is in the ledger for each of the keys."""

        def missing() -> list[str]:
            found = {entry.key for entry in self.entries(event)}
            return [key for key in keys if key not in found]

        deadline = time.monotonic() + timeout
        while left := missing():
            if time.monotonic() > deadline:
                pytest.fail(f"{len(left)} of {len(keys)} without {event}: {left[:10]}")
            time.sleep(0.1)

    def states(self, ids: Collection[str]) -> dict[str, str]:
        """As the result store has them; those that it does not know are left out."""
        if not ids:
            return {}
        found = self.results.mget([f"celery-task-meta-{each}" for each in ids])
        assert isinstance(found, list)
        stored = zip(ids, found, strict=True)
        return {each: json.loads(meta)["status"] for each, meta in stored if meta}

    def result(self, task_id: str) -> Any:
        meta = self.results.get(f"celery-task-meta-{task_id}")
        assert isinstance(meta, bytes), f"no result of {task_id}"
        return json.loads(meta)

    def ended(self, ids: Collection[str], timeout: float = 30.0) -> dict[str, str]:
        """The states of all these tasks, each of them a last one."""

        def open_ends() -> list[tuple[str, str]]:
            states = self.states(ids)
            pairs = [(each, states.get(each, "none")) for each in ids]
            return [(each, state) for each, state in pairs if state not in ENDED]

        deadline = time.monotonic() + timeout
        while left := open_ends():
            if time.monotonic() > deadline:
                pytest.fail(f"{len(left)} of {len(ids)} did not end: {left[:10]}")
            time.sleep(0.1)
        return self.states(ids)

    def eventually(self, condition: Callable[[], Any], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout:g} s: {what}")
            time.sleep(0.1)

    def running_in(self, worker: Worker) -> int:
        """How many bodies run there, and have not ended."""
        family = worker.family()
        every = (run for of_key in self.runs().values() for run in of_key)
        return sum(run.pid in family and run.ended is None for run in every)

    def in_broker(self) -> int:
        """How many messages wait, or are not acknowledged where the broker lets us see them."""
        if self.broker.startswith("redis"):
            with Redis.from_url(self.broker) as client:
                return int(client.llen(self.token)) + int(client.hlen("unacked"))
        with self.client.connection_for_write() as connection, connection.channel() as channel:
            waiting: int = channel.queue_declare(self.token, passive=True).message_count
        return waiting

    def dead_letters(self) -> list[Letter]:
        with letters(self.client) as kept:
            return list(kept.each())

    # The end.

    def close(self) -> None:
        if self._ending.is_set():
            return
        self._ending.set()
        self._reviver.join()
        for worker in self.workers:
            for process in (*worker.former, worker.process):
                if process.running:
                    process.signal(signal.SIGKILL)
                process.stop()  # its children too
        close_results(self.client.backend)
        self.client.close()
        self.results.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self._tell()
        finally:
            self.close()

    def _tell(self) -> None:
        """What is left, and the workers' last words, for whoever reads why a scenario failed."""
        if self.broker.startswith("redis"):
            self._tell_keys()
        for worker in self.workers:
            for process in (*worker.former[-2:], worker.process):
                alive = "alive" if process.running else "dead"
                lines = process.output.splitlines()
                print(f"--- {worker.name} {process.pid} ({alive}, {len(lines)} lines)")
                print("\n".join(lines[-40:]), file=sys.stdout)

    def _tell_keys(self) -> None:
        sizes = {b"hash": "HLEN", b"zset": "ZCARD", b"list": "LLEN", b"set": "SCARD"}
        for key in sorted(self.results.scan_iter(count=1000)):
            kind = self.results.type(key)
            if kind in sizes:
                size = execute(self.results, sizes[kind], key)
                print(f"--- {key!r}: {size} in a {kind!r}")
