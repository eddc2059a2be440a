"""Servers and networks fail under load: workers resume, and what was accepted is done.

`adelay` sends the load, through the same failing network.
"""

import random
import time
from collections.abc import Callable, Iterator
from itertools import product

import pytest

from chaos.load import Load
from chaos.proxy import Proxy
from chaos.servers import RedisServer, Server
from chaos.stage import BROKERS, LONG, POOLS, RECOVERY, Stage, Worker, count

RESUMES_WITHIN = 10.0  # seconds
Fault = Callable[[Server, Proxy], None]


def killed(server: Server, network: Proxy) -> None:
    server.kill()
    time.sleep(1)
    server.start()


def paused(server: Server, network: Proxy) -> None:
    server.pause()
    time.sleep(5)
    server.resume()


def reset(server: Server, network: Proxy) -> None:
    for _ in range(5):
        network.reset()
        time.sleep(0.3)


def refused(server: Server, network: Proxy) -> None:
    network.refuse()
    time.sleep(4)
    network.heal()


def black_holed(server: Server, network: Proxy) -> None:
    network.swallow()
    time.sleep(5)
    network.heal()


def delayed(server: Server, network: Proxy) -> None:
    network.delay(0.3)
    time.sleep(4)
    network.heal()


FAULTS = [killed, paused, reset, refused, black_holed, delayed]
SHORT = {"redis": [killed, paused, reset, black_holed], "rabbitmq": [killed, black_holed]}


@pytest.fixture
def network(broker: Server) -> Iterator[Proxy]:
    with Proxy(broker.port) as proxy:
        yield proxy


def cases() -> list[tuple[str, str, Fault]]:
    if LONG:
        return list(product(BROKERS, POOLS, FAULTS))
    return [(broker, "celeriac", fault) for broker in BROKERS for fault in SHORT[broker]]


@pytest.mark.parametrize(
    ("broker", "pool", "fault"),
    cases(),
    ids=lambda each: getattr(each, "__name__", each),
    indirect=["broker"],
)
def test_after_an_outage_workers_resume_and_all_that_was_accepted_is_done(
    stage: Callable[..., Stage],
    broker: Server,
    redis: RedisServer,
    network: Proxy,
    pool: str,
    fault: Fault,
) -> None:
    rng = random.Random(fault.__name__)
    through = broker.url_at(network.port)
    # Where Redis is the broker its results are there too.
    results = through if broker is redis else redis.url
    with stage(through, results) as play:
        crew = play.crew(2, pool, 10)
        load = Load(play, rng)
        with load.running():
            for _ in range(count(short=1, long=5)):
                time.sleep(rng.uniform(0.5, 1.5))
                fault(broker, network)
                assert_all_resume(play, crew, time.time())
        assert len(load.sent) > 50
        play.written("end", load.sent, RECOVERY + 30)
        states = play.ended(list(load.sent.values()))
        assert set(states.values()) == {"SUCCESS"}


def assert_all_resume(play: Stage, crew: list[Worker], since: float) -> None:
    """Each worker begins a task after this moment, the same process as before."""
    families = {worker.name: worker.family() for worker in crew}
    while True:
        begun = {entry.pid for entry in play.entries("begin") if entry.at > since}
        for worker in crew:
            families[worker.name] |= worker.family()  # children may be new
        idle = [name for name, pids in families.items() if not pids & begun]
        if not idle:
            break
        late = time.time() - since
        assert late < RESUMES_WITHIN, f"did not begin a task within {late:.1f} s: {idle}"
        time.sleep(0.1)
    assert all(worker.process.running for worker in crew)
