"""A stock Celery worker and ours share a queue, and each is killed in turn."""

import random
import time
from collections.abc import Callable

import pytest

from chaos.stage import LONG, POOLS, RECOVERY, Stage, Worker, count

CONCURRENCY = 4
VISIBILITY = 6.0  # seconds after which kombu gives back what a stock worker held
LOOKS_EVERY = (
    100.0  # seconds between two looks for such messages, kombu's; a worker starts with one
)


# On RabbitMQ the two share a queue only if the stock worker declares it as ours do.
@pytest.mark.parametrize("broker", ["redis"], indirect=True)
@pytest.mark.parametrize("pool", list(POOLS) if LONG else ["celeriac"])
def test_a_stock_worker_and_ours_lose_nothing_however_they_are_killed(
    stage: Callable[..., Stage], pool: str
) -> None:
    rng = random.Random(5)
    # Killed again and again with all that it runs, it may make a poison of what is none.
    with stage(visibility_timeout=VISIBILITY, MAX_DELIVERIES="100") as play:
        ours = play.worker(pool, CONCURRENCY, revived=True).wait_until_ready()
        stock = play.worker("threads", CONCURRENCY, revived=True, STOCK="1").wait_until_ready()
        sent: dict[str, str] = {}
        for turn in range(count(short=2, long=20)):
            keys = [f"{turn}-{number}" for number in range(40)]
            sent |= {key: play.send("work", key, rng.uniform(0.3, 0.6)) for key in keys}
            victim = (ours, stock)[turn % 2]
            wait_until_full(play, victim)
            victim.kill()
        if not LONG:
            time.sleep(VISIBILITY)
            play.worker(pool, CONCURRENCY)
        play.written("end", sent, VISIBILITY + LOOKS_EVERY + RECOVERY + 60)
        assert set(play.ended(list(sent.values())).values()) == {"SUCCESS"}
        assert {worker.name for worker in (ours, stock) if worker.former} == {ours.name, stock.name}


def wait_until_full(play: Stage, worker: Worker) -> None:
    """It runs all that it may.

    A stock worker that waits for more would lose what it takes and has not recorded yet.
    """
    worker.wait_until_ready()
    play.eventually(lambda: play.running_in(worker) >= CONCURRENCY, 30, f"{worker.name} to be full")
