"""Remote control answers while a worker is busy, however busy it is."""

import time
from collections.abc import Callable
from itertools import product

from chaos.stage import POOLS, Stage, Worker, cast

ANSWERS_WITHIN = 1.0  # seconds


def ask(play: Stage, worker: Worker, command: str, **arguments: object) -> object:
    """The worker's answer; it has the promised time, and the connection is made beforehand."""
    node = f"{worker.name}@"
    with play.client.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)
        began = time.monotonic()
        replies = play.client.control.broadcast(
            command, arguments=arguments, reply=True, timeout=5, limit=1, connection=connection
        )
        took = time.monotonic() - began
    assert len(replies) == 1, f"no answer to {command}"
    assert next(iter(replies[0])).startswith(node)
    assert took < ANSWERS_WITHIN, f"{command} took {took:.2f} s"
    return next(iter(replies[0].values()))


@cast(*product(["redis"], POOLS), ("rabbitmq", "celeriac"))
def test_control_answers_while_a_thousand_tasks_run_and_one_blocks(
    stage: Callable[..., Stage], pool: str
) -> None:
    concurrency = {"celeriac": 1010, "threads": 50, "prefork": 4}[pool]
    with stage() as play:
        worker = play.worker(pool, concurrency).wait_until_ready()
        blocking = play.send("work", "blocks", 60.0)
        play.written("begin", ["blocks"])  # nobody waits for the ends of all these
        sent = [play.send("awork", f"t{number}", 30.0) for number in range(1000)]
        play.written("begin", [f"t{number}" for number in range(min(concurrency - 1, 1000))])
        if pool == "celeriac":  # whose loop is that of the thousand
            play.send("block_loop", "blocks the loop", 3.0)
            play.written("begin", ["blocks the loop"])
        for _ in range(3):
            assert ask(play, worker, "ping") == {"ok": "pong"}
            active = ask(play, worker, "active")
            assert isinstance(active, list)
            assert blocking in {request["id"] for request in active}
            last = sent.pop()
            answer = ask(play, worker, "revoke", task_id=last, terminate=False)
            assert isinstance(answer, dict)
            assert "ok" in answer
