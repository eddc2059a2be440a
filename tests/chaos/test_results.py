"""A result store that is away when a task ends: no task is over before its result is stored."""

import time
from collections.abc import Callable, Iterator

import pytest

from chaos.servers import RedisServer
from chaos.stage import RECOVERY, Stage, cast

AWAY = 5.0  # seconds


@pytest.fixture(scope="session")
def _results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("results")) as server:
        yield server


@pytest.fixture
def results(_results: RedisServer) -> Iterator[RedisServer]:
    """A store of their own, so that the broker is there all the time."""
    yield _results
    _results.recover()


@pytest.mark.parametrize("outage", ["killed", "paused"])
@pytest.mark.parametrize("survives", [True, False], ids=["worker-survives", "worker-killed"])
@cast(("redis", "celeriac"))
def test_a_task_whose_result_cannot_be_stored_is_not_over(
    stage: Callable[..., Stage], results: RedisServer, pool: str, survives: bool, outage: str
) -> None:
    with stage(backend_url=results.url, store=results.url) as play:
        worker = play.worker(pool, 4).wait_until_ready()
        keys = ["synchronous", "asynchronous", "waits behind"]
        sent = [play.send("work", keys[0], 1.5), play.send("awork", keys[1], 1.5)]
        play.written("begin", keys[:2])
        if outage == "killed":
            results.kill()
        else:
            results.pause()
        play.written("end", keys[:2])
        time.sleep(AWAY)
        if not survives:
            worker.kill()
            worker.replace()
        results.recover()
        sent.append(play.send("work", keys[2]))
        assert set(play.ended(sent, RECOVERY + 20).values()) == {"SUCCESS"}
        assert [play.result(each)["result"] for each in sent] == keys
        if survives:
            assert worker.process.running
