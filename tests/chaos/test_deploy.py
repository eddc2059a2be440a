"""A rolling deploy: each worker gets SIGTERM, its grace period, and then SIGKILL."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos.load import Load
from chaos.stage import LEASE, LONG, RECOVERY, Stage, Worker, cast

GRACE = 10.0 if LONG else 5.0  # seconds between the platform's SIGTERM and its SIGKILL
LEFT = 2.0  # of them for giving back what does not fit
LONGEST = 30.0 if LONG else 8.0  # seconds that a task takes
CONCURRENCY = 10


@dataclass
class Stop:
    """What became of one worker."""

    at: float
    pids: set[int]
    code: int
    took: float


def stop(worker: Worker) -> Stop:
    family, at = worker.family(), time.time()
    worker.process.signal(signal.SIGTERM)
    while worker.process.running and time.time() < at + GRACE:
        time.sleep(0.05)
    took = time.time() - at
    if worker.process.running:
        worker.kill()
    return Stop(at, family, worker.process.wait(), took)


@cast(("redis", "celeriac"), ("rabbitmq", "prefork"))
def test_a_rolling_deploy_loses_nothing_and_doubles_only_what_does_not_fit(
    stage: Callable[..., Stage], pool: str
) -> None:
    rng = random.Random(10)
    with stage(CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT=str(GRACE - LEFT)) as play:
        old = play.crew(2, pool, CONCURRENCY)
        stops: list[Stop] = []
        load = Load(play, rng, longest=LONGEST, ahead=3 * CONCURRENCY)
        with load.running():
            for worker in old:
                time.sleep(rng.uniform(1, 3))
                play.worker(pool, CONCURRENCY).wait_until_ready()
                stops.append(stop(worker))
            time.sleep(1)
        play.written("end", load.sent, LONGEST + RECOVERY + 60)
        assert set(play.ended(list(load.sent.values())).values()) == {"SUCCESS"}
        assert [each.code for each in stops] == [0] * len(stops)
        assert max(each.took for each in stops) < GRACE
        doubled = {
            key: of_key
            for key, of_key in play.runs().items()
            for run in of_key[:-1]
            if fitted(run.began + load.seconds[key], run.pid, stops)
        }
        assert doubled == {}


@cast(("redis", "celeriac"), ("redis", "prefork"), ("rabbitmq", "celeriac"))
def test_a_second_signal_gives_everything_back_at_once(
    stage: Callable[..., Stage], pool: str
) -> None:
    with stage(CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT="60") as play:
        first = play.worker(pool, 4).wait_until_ready()
        keys = [f"t{number}" for number in range(4)]
        names = ["work" if pool == "prefork" else "awork", "awork"] * 2
        sent = [play.send(name, key, 12.0) for name, key in zip(names, keys, strict=True)]
        play.written("begin", keys)
        second = play.worker(pool, 4).wait_until_ready()
        first.process.signal(signal.SIGTERM)
        time.sleep(0.5)
        began = time.time()
        first.process.signal(signal.SIGTERM)
        assert first.process.wait() == 0
        assert time.time() - began < 3
        # Given back, not found when a lease has run out.
        play.eventually(lambda: play.running_in(second) == len(keys), LEASE, "the other to begin")
        assert set(play.ended(sent).values()) == {"SUCCESS"}


def fitted(end: float, pid: int, stops: list[Stop]) -> bool:
    """Whether what was to end then could have ended in its worker's grace period."""
    ours = [each for each in stops if pid in each.pids]
    return not ours or end < ours[0].at + GRACE - LEFT - 0.5
