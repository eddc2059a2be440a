"""Every way in which a worker ends, in every pool, on every broker, with either acknowledgement."""

import os
import random
import signal
import time
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
from celery import chord, group

from chaos.stage import BROKERS, LONG, POOLS, RECOVERY, Stage, Worker

CONCURRENCY = 4
GRACE = 1.0  # seconds; some tasks take less, some more
TAKES = (0.5, 2.5)


def kill_child(worker: Worker) -> None:
    """All of them are at work by now."""
    children = sorted(worker.family() - {worker.pid})
    os.kill(random.Random(1).choice(children), signal.SIGKILL)


def signals(*numbers: signal.Signals) -> Callable[[Worker], None]:
    def send(worker: Worker) -> None:
        process = worker.process
        for number in numbers:
            if process.running:
                process.signal(number)
            time.sleep(0.3)

    return send


def nothing(worker: Worker) -> None:
    """A task does it."""


class Kind(NamedTuple):
    end: Callable[[Worker], None]
    victim: str = ""  # the task that does it instead


KINDS = {
    "child-killed": Kind(kill_child),
    "killed": Kind(signals(signal.SIGKILL)),
    "TERM": Kind(signals(signal.SIGTERM)),
    "INT": Kind(signals(signal.SIGINT)),
    "QUIT": Kind(signals(signal.SIGQUIT)),
    "TERM-three-times": Kind(signals(*[signal.SIGTERM] * 3)),
    "TERM-KILL": Kind(signals(signal.SIGTERM, signal.SIGKILL)),
    "exit": Kind(nothing, "exit"),
    "memory": Kind(nothing, "memory"),
    "hard-limit": Kind(nothing, "limit"),
}


class Case(NamedTuple):
    broker: str
    pool: str
    kind: str
    late: bool

    @property
    def makes_sense(self) -> bool:
        return self.kind != "child-killed" or self.pool == "prefork"  # others have no children


def cases() -> list[Case]:
    """All; the short version has one of each kind, always the same ones."""
    every = [Case(*each) for each in product(BROKERS, POOLS, KINDS, (True, False))]
    every = [case for case in every if case.makes_sense]
    if LONG:
        return every
    rng = random.Random(12)
    return [rng.choice([case for case in every if case.kind == kind]) for kind in KINDS]


def name_of(value: object) -> str:
    return {True: "late", False: "early"}[value] if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("broker", "pool", "kind", "late"), cases(), ids=name_of, indirect=["broker"]
)
def test_however_a_worker_ends_every_task_has_an_end_and_what_follows_it(
    stage: Callable[..., Stage], pool: str, kind: str, late: bool
) -> None:
    rng = random.Random(f"{pool} {kind} {late}")
    with stage(CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT=str(GRACE)) as play:
        crew = play.crew(2, pool, CONCURRENCY, late=late, revived=True)
        sent = Sent(play, KINDS[kind].victim)
        victim = sent.wait_until_one_works(crew)
        time.sleep(rng.uniform(0, 0.4))
        KINDS[kind].end(victim)
        sent.states = play.ended(sent.ids, RECOVERY + 30)
        shares_memory = kind == "memory" and pool != "prefork"
        sent.assert_side_effects(late, shares_memory=shares_memory)
        sent.assert_followed(late)


class Sent:
    """Single tasks with what follows them, a group of such, a chord, and who ends the worker."""

    def __init__(self, play: Stage, victim: str) -> None:
        self.play = play
        self.tasks: dict[str, str] = {}  # key -> id
        self.after: dict[str, str] = {}  # key -> id of its callback
        self.states: dict[str, str] = {}
        self.victim = self._send_victim(victim)
        for number in range(6):
            self._followed(f"single{number}", number).apply_async()
        group(self._followed(f"group{number}", number) for number in range(4)).apply_async()
        header = [self._task(f"header{number}", number) for number in range(4)]
        body = play.signature("gather", kwargs={"key": "chord"}, task_id=f"{play.token}-chord")
        body.link_error(play.signature("errback"))
        self.chord: str = chord(header)(body).id

    def _send_victim(self, victim: str) -> list[str]:
        if victim == "limit":
            sent = [self.play.send("over_limit", "synchronous", 4.0)]
            return [*sent, self.play.send("aover_limit", "asynchronous", 4.0)]
        if victim:
            return [self.play.send("kill_worker", "victim", victim, 1)]
        return []

    def _task(self, key: str, number: int) -> Any:
        name = "awork" if number // 2 % 2 else "work"
        self.tasks[key] = f"{self.play.token}-{key}"
        return self.play.signature(name, key, TAKES[number % 2], task_id=self.tasks[key])

    def _followed(self, key: str, number: int) -> Any:
        task = self._task(key, number)
        self.after[key] = f"{self.tasks[key]}-callback"
        callback = self.play.signature("callback", task_id=self.after[key])
        return task.set(link=callback, link_error=self.play.signature("errback"))

    @property
    def ids(self) -> list[str]:
        return [*self.tasks.values(), *self.victim, self.chord]

    def wait_until_one_works(self, crew: list[Worker]) -> Worker:
        """The first of the crew that has begun one of the tasks."""
        while True:
            begun = {entry.pid for entry in self.play.entries("begin")}
            for worker in crew:
                if worker.family() & begun:
                    return worker
            time.sleep(0.05)

    def assert_side_effects(self, late: bool, *, shares_memory: bool) -> None:
        events: dict[str, list[str]] = {key: [] for key in self.tasks}
        for entry in self.play.entries():
            events.setdefault(entry.key, []).append(entry.event)
        if late:
            undone = [key for key in self.tasks if "end" not in events[key]]
            assert undone == [] or shares_memory
            failed = [key for key, each in self.tasks.items() if self.states[each] != "SUCCESS"]
            # Where all share one memory, others find none either, and say so.
            assert failed == [] or shares_memory
        else:
            doubled = [key for key, each in events.items() if each.count("begin") > 1]
            assert doubled == []

    def assert_followed(self, late: bool) -> None:
        succeeded = {key for key in self.after if self.states[self.tasks[key]] == "SUCCESS"}
        callbacks = self.play.ended([self.after[key] for key in succeeded], RECOVERY + 10)
        called = {entry.key for entry in self.play.entries("callback")}
        for key in succeeded:
            # One that was acknowledged when its worker ended did not run, and says so.
            assert key in called or (not late and callbacks[self.after[key]] == "FAILURE"), key
        failed = {self.tasks[key] for key in self.after.keys() - succeeded}
        if self.states[self.chord] == "SUCCESS":
            self.play.written("end", ["chord"])
        else:
            failed.add(self.chord)
        assert failed - {entry.task_id for entry in self.play.entries("errback")} == set()
