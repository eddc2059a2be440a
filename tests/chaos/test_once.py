"""Where nothing fails, each task runs exactly once, however long it takes or waits."""

import time
from collections.abc import Callable

from chaos.stage import LEASE, Stage, cast, count


def assert_ran_once(play: Stage, keys: list[str]) -> None:
    runs = play.runs()
    assert {key: len(runs.get(key, [])) for key in keys} == dict.fromkeys(keys, 1)


@cast(("redis", "celeriac"), ("redis", "prefork"), ("rabbitmq", "celeriac"))
def test_without_faults_a_thousand_tasks_run_once_each(
    stage: Callable[..., Stage], pool: str
) -> None:
    with stage() as play:
        play.crew(2, pool, 10)
        keys = [f"t{number}" for number in range(1000)]
        sent = [play.send("work", key, 0.01) for key in keys]
        assert set(play.ended(sent, 60).values()) == {"SUCCESS"}
        assert_ran_once(play, keys)


@cast(("redis", "celeriac"), ("rabbitmq", "celeriac"))
def test_tasks_three_leases_long_and_those_due_in_five_leases_run_once_each(
    stage: Callable[..., Stage], pool: str
) -> None:
    each = count(short=1, long=10)
    # kombu gives back what was held for longer than this; it is an hour where nobody says so.
    with stage(visibility_timeout=2 * LEASE) as play:
        play.crew(2, pool, 4 * each)
        began = time.time()
        keys: list[str] = []
        sent: list[str] = []
        for number in range(each):
            # One blocked loop holds up all that wait on it: the first is enough.
            for name in ("work", "awork") if number else ("work", "awork", "block_loop"):
                keys.append(f"long {name} {len(keys)}")
                sent.append(play.send(name, keys[-1], 3 * LEASE))
            for name in ("work", "awork"):
                keys.append(f"due {name} {len(keys)}")
                sent.append(play.send(name, keys[-1], countdown=5 * LEASE))
        assert set(play.ended(sent, 5 * LEASE + 20).values()) == {"SUCCESS"}
        # A second run would come soon: what a lease ends comes back within it.
        time.sleep(LEASE + 1)
        assert_ran_once(play, keys)
        due = [runs[0].began for key, runs in play.runs().items() if key.startswith("due")]
        assert min(due) >= began + 5 * LEASE
