"""Workers are killed while they work: nothing is lost, only what was in flight is repeated."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from chaos.ledger import Run
from chaos.load import AHEAD, Load
from chaos.stage import LEASE, RECOVERY, Stage, cast, count

CONCURRENCY = 10
# Between a body's end and its acknowledgement: the result is written first.
ACKNOWLEDGED_WITHIN = 1.0


@dataclass
class Kill:
    at: float
    pids: set[int]


@cast(("redis", "celeriac"), ("rabbitmq", "celeriac"))
def test_killed_workers_lose_nothing_and_double_only_what_was_in_flight(
    stage: Callable[..., Stage], pool: str
) -> None:
    rng = random.Random(4)
    # One that runs wherever somebody is killed is no poison.
    with stage(MAX_DELIVERIES="100") as play:
        crew = play.crew(2, pool, CONCURRENCY, revived=True)
        load = Load(play, rng, least=count(short=1200, long=20_000))
        kills: list[Kill] = []
        total = count(short=4, long=50)
        with load.running():
            for number in range(total):
                # At first whoever takes over is killed as well, later it is left alone.
                time.sleep(rng.uniform(0.5, 3.0) + (RECOVERY if number > total / 2 else 0))
                victim = rng.choice(crew)
                if victim.process.running:
                    family = victim.family()
                    kills.append(Kill(victim.kill(), family))
        play.written("end", load.sent, RECOVERY + 60)
        assert set(play.ended(list(load.sent.values())).values()) == {"SUCCESS"}
        runs = play.runs()
        assert_doubled_in_flight(runs, kills)
        assert_recovered_in_time(runs, kills)


@cast(("redis", "celeriac"))
def test_with_early_acknowledgement_killed_workers_double_nothing_and_every_task_ends(
    stage: Callable[..., Stage], pool: str
) -> None:
    rng = random.Random(6)
    with stage() as play:
        crew = play.crew(2, pool, CONCURRENCY, late=False, revived=True)
        kills = count(short=3, long=20)
        lost = CONCURRENCY * kills  # at most, which never end in the ledger
        load = Load(play, rng, least=count(short=800, long=5000), ahead=AHEAD + lost)
        with load.running():
            for _ in range(kills):
                time.sleep(rng.uniform(0.5, 2.0))
                victim = rng.choice(crew)
                if victim.process.running:
                    victim.kill()
        states = play.ended(list(load.sent.values()), RECOVERY + 60)
        runs = play.runs()
        assert {key: len(of_key) for key, of_key in runs.items() if len(of_key) > 1} == {}
        done = {key for key, (run, *_) in runs.items() if run.ended}
        assert {key for key, each in load.sent.items() if states[each] == "SUCCESS"} <= done
        assert set(states.values()) <= {"SUCCESS", "FAILURE"}


def assert_doubled_in_flight(runs: dict[str, list[Run]], kills: list[Kill]) -> None:
    """Whatever ran again had been running, or just ended, where a kill ended it."""
    for of_key in runs.values():
        for earlier in of_key[:-1]:
            ends = [kill for kill in kills if earlier.pid in kill.pids]
            assert ends, f"a second run of what no kill ended: {of_key}"
            if earlier.ended is not None:
                assert earlier.ended > ends[0].at - ACKNOWLEDGED_WITHIN, of_key
    again = sum(len(of_key) - 1 for of_key in runs.values())
    assert again <= CONCURRENCY * len(kills)


def assert_recovered_in_time(runs: dict[str, list[Run]], kills: list[Kill]) -> None:
    """Of kills with no other soon after: it might be of a worker that had taken over."""
    took = {}
    for key, of_key in runs.items():
        for earlier, later in pairwise(of_key):
            ended = next(kill.at for kill in kills if earlier.pid in kill.pids)
            if not any(ended < kill.at < ended + RECOVERY for kill in kills):
                took[key] = later.began - ended
    assert took
    assert {key: seconds for key, seconds in took.items() if seconds > RECOVERY} == {}


@cast(("redis", "celeriac"), ("redis", "prefork"), ("rabbitmq", "celeriac"))
def test_a_task_that_kills_its_worker_ends_and_costs_no_other(
    stage: Callable[..., Stage], pool: str
) -> None:
    good = count(short=300, long=1000)
    with stage() as play:
        play.crew(2, pool, CONCURRENCY, revived=True)
        first = [play.send("awork", f"t{number}", 0.02) for number in range(good // 2)]
        poison = play.send("kill_worker", "poison", "kill", 1000)
        rest = [play.send("awork", f"u{number}", 0.02) for number in range(good // 2)]
        states = play.ended([*first, *rest, poison], 60)
        assert states.pop(poison) == "FAILURE"
        assert set(states.values()) == {"SUCCESS"}
        begun = [entry for entry in play.entries("begin") if entry.key == "poison"]
        assert len(begun) <= 3
        assert [letter.id for letter in play.dead_letters()] == [poison]
        time.sleep(LEASE + 1)
        assert len([entry for entry in play.entries("begin") if entry.key == "poison"]) <= 3
