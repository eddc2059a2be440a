"""A quorum queue drops what was delivered too often; its limit must not be how a task ends."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from celeriac import rabbitmq
from chaos.stage import BROKERS, LEASE, LONG, POOLS, Stage

LIMIT = 2  # deliveries, below the starts that we allow
# Without a place for dead letters, RabbitMQ would drop it, and nobody could know: `celeriac doctor`
# names such a queue.
ANY: Any = rabbitmq.queue("any")
QUORUM = json.dumps(ANY.queue_arguments | {"x-delivery-limit": LIMIT})

pytestmark = pytest.mark.skipif("rabbitmq" not in BROKERS, reason="needs RabbitMQ")


@pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
@pytest.mark.parametrize("pool", list(POOLS) if LONG else ["celeriac"])
@pytest.mark.parametrize("how", ["gives itself back", "kills its worker"])
def test_a_task_that_reaches_the_delivery_limit_ends_as_a_failure_and_a_dead_letter(
    stage: Callable[..., Stage], pool: str, how: str
) -> None:
    with stage(QUEUE_ARGUMENTS=QUORUM) as play:
        play.crew(2, pool, 4, revived=True)
        # Not beside it: who is given back with a killed worker comes to the limit, too.
        before = [play.send("work", f"t{number}", 0.1) for number in range(20)]
        assert set(play.ended(before).values()) == {"SUCCESS"}
        if how == "kills its worker":
            bad = play.send("kill_worker", "bad", "kill", 1000)
        else:
            bad = play.send("give_back", "bad")
        assert play.ended([bad]) == {bad: "FAILURE"}
        assert play.result(bad)["result"]["exc_message"]
        assert [letter.id for letter in play.dead_letters()] == [bad]
        after = [play.send("work", f"u{number}", 0.1) for number in range(20)]
        assert set(play.ended(after).values()) == {"SUCCESS"}
        time.sleep(LEASE)
        assert len(play.runs()["bad"]) <= LIMIT + 1
        assert play.in_broker() == 0
