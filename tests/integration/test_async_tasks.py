"""`async def` tasks beside synchronous ones, in every pool, on every broker: both as in Celery."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from celery import Celery, Task, chain, chord, group
from celery.exceptions import Retry

from celeriac import adopt
from celeriac.embedded import Valkey
from celeriac.errors import LateAdoptionError, UnsupportedPoolError
from support import empty_redis, eventually, given
from workers import BROKERS, POOLS, Worker


@pytest.fixture(scope="module", params=BROKERS)
def servers(request: pytest.FixtureRequest, valkey: Valkey) -> tuple[str, str]:
    """A broker and a result backend."""
    backend = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(backend)
    return (given("TEST_AMQP_URL") if request.param == "rabbitmq" else backend), backend


@pytest.fixture(scope="module", params=list(POOLS))
def worker(request: pytest.FixtureRequest, servers: tuple[str, str]) -> Iterator[Worker]:
    with Worker("async_app", request.param, *servers) as running:
        yield running


@pytest.fixture(params=["async", "sync"])
def kind(request: pytest.FixtureRequest) -> str:
    """What the names of tasks with such bodies end in."""
    return {"async": "", "sync": "_sync"}[request.param]


def test_a_body_gives_its_value(worker: Worker, kind: str) -> None:
    assert worker.send(f"add{kind}", 1, 2).get(timeout=10) == 3
    assert worker.send(f"class_based{kind}", 1).get(timeout=10) == 2
    assert worker.send(f"shared{kind}", 1).get(timeout=10) == 1


def test_an_error_is_a_failure_with_its_traceback_in_the_body(worker: Worker, kind: str) -> None:
    result = worker.send(f"fail{kind}", "why")
    with pytest.raises(ValueError, match="why"):
        result.get(timeout=10)
    assert f"in fail{kind}" in result.traceback


def test_the_request_is_the_tasks_own_everywhere_in_the_body(worker: Worker, kind: str) -> None:
    results = [worker.send(f"who_am_i{kind}") for _ in range(20)]
    for result in results:
        assert result.get(timeout=20) == [result.id] * 4


def test_retries_by_hand_and_by_declaration(worker: Worker, kind: str) -> None:
    assert worker.send(f"retry_by_hand{kind}").get(timeout=20) == 2
    assert worker.send(f"retry_by_declaration{kind}").get(timeout=20) == 2


def test_chain_group_and_chord(worker: Worker, kind: str) -> None:
    s = worker.signature
    added = chain(s(f"add{kind}", 1, 1), s(f"add{kind}", 2), app=worker.client)
    assert added.delay().get(timeout=20) == 4
    numbers = group([s(f"add{kind}", n, n) for n in range(5)], app=worker.client)
    assert numbers.delay().get(timeout=20) == [0, 2, 4, 6, 8]
    assert chord(numbers, s(f"total{kind}"), app=worker.client).delay().get(timeout=20) == 20


def test_ignore_reject_and_errbacks(worker: Worker, kind: str) -> None:
    ignored = worker.send(f"ignore{kind}")
    eventually(lambda: ignored.state == "SEEN")
    worker.send(f"reject{kind}")
    assert worker.noted("reject") == "run"
    worker.send(f"fail{kind}", "told", link_error=worker.signature(f"handle_error{kind}"))
    assert worker.noted("errback") == "told"


def test_a_linked_task_gets_the_value(worker: Worker, kind: str) -> None:
    linked = worker.signature(f"add{kind}", 10)
    linked.set(task_id=f"linked-{worker.pool}-{os.urandom(4).hex()}")
    worker.send(f"add{kind}", 1, 2, link=linked)
    followed = worker.client.AsyncResult(linked.id)
    assert followed.get(timeout=10) == 13


def test_a_foreign_base_class_runs_async_bodies_with_its_hooks_and_signals(
    worker: Worker,
    kind: str,
) -> None:
    assert worker.send(f"foreign{kind}", 7).get(timeout=10) == 7
    assert worker.noted("success") == "7"
    assert worker.noted("after_return") == "SUCCESS"
    assert worker.send(f"foreign_and_late{kind}", 8).get(timeout=10) == 8
    assert worker.noted("success") == "8"
    assert worker.noted("after_return") == "SUCCESS"


def test_pydantic_models_go_in_and_out(worker: Worker, kind: str) -> None:
    assert worker.send(f"mirror{kind}", {"x": 1, "y": 2}).get(timeout=10) == {"x": 2, "y": 1}


def test_one_loop_serves_every_task_of_a_process(worker: Worker) -> None:
    results = [worker.send("loop_of_this_process") for _ in range(20)]
    seen = {tuple(result.get(timeout=10)) for result in results}
    assert len(seen) == len({process for process, _ in seen})


def test_what_a_body_leaves_running_is_cancelled_and_awaited(worker: Worker) -> None:
    assert worker.send("leave_a_child").get(timeout=10) == 1
    assert worker.noted("child") == "cleaned up"


def test_an_eager_call_inside_a_body_does_not_wait_for_itself(worker: Worker, kind: str) -> None:
    assert worker.send(f"eager_call{kind}").get(timeout=10) == 42


def test_a_body_that_cancels_itself_is_a_failure_that_says_so(worker: Worker) -> None:
    for name in ("cancel_itself", "cancel_itself_at_the_end"):
        result = worker.send(name)
        assert "cancelled from inside" in str(result.get(timeout=10, propagate=False))
    assert worker.send("add", 1, 2).get(timeout=10) == 3


def test_the_soft_time_limit_is_raised_inside_the_body(worker: Worker) -> None:
    if worker.pool not in ("prefork", "celeriac"):
        return  # Celery has time limits in prefork only
    result = worker.send("too_long")
    assert "SoftTimeLimitExceeded" in repr(result.get(timeout=20, propagate=False))
    assert worker.noted("soft") == "raised inside"


@pytest.fixture
def eager() -> Celery:
    app = adopt(Celery("eager", broker="memory://", backend="cache+memory://"))
    app.conf.task_always_eager = True
    return app


def test_eager_and_direct_calls(eager: Celery) -> None:
    @eager.task(shared=False)
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    @eager.task(shared=False)
    async def four_times(x: int) -> int:
        result: int = await double(await double(x))
        return result

    assert double.delay(2).get() == 4
    assert double.apply((2,)).get() == 4
    assert asyncio.run(double(2)) == 4
    assert asyncio.run(four_times(2)) == 8
    assert four_times.delay(2).get() == 8


def test_an_eager_call_from_a_running_loop_works(eager: Celery) -> None:
    @eager.task(shared=False)
    async def twice(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    async def view() -> int:
        result: int = twice.delay(2).get()
        return result

    assert asyncio.run(view()) == 4


def test_retry_in_a_direct_call_raises_the_error_as_in_stock_celery(eager: Celery) -> None:
    @eager.task(bind=True, shared=False)
    async def once(self: Task) -> None:
        raise self.retry(exc=KeyError("k"))

    with pytest.raises((KeyError, Retry)):
        asyncio.run(once())


def test_a_task_that_calls_itself_awaits_itself(eager: Celery) -> None:
    @eager.task(bind=True, shared=False)
    async def countdown(self: Callable[[int], object], n: int) -> int:
        if n == 0:
            return 0
        result: int = await self(n - 1)  # type: ignore[misc]
        return result + 1

    assert countdown.delay(5).get() == 5


def test_adopting_after_tasks_were_made_names_them() -> None:
    app = Celery("late", broker="memory://")

    @app.task(shared=False)
    def early() -> None: ...

    app.finalize()
    with pytest.raises(LateAdoptionError, match=r"early.*right after Celery"):
        adopt(app)


def test_decorators_before_adoption_are_fine_while_nothing_was_made() -> None:
    app = Celery("soon", broker="memory://", backend="cache+memory://")

    @app.task(shared=False)
    async def in_time() -> int:
        return 1

    adopt(app)
    app.conf.task_always_eager = True
    assert in_time.delay().get() == 1


def test_an_app_with_a_base_class_of_its_own_keeps_it() -> None:
    class Mine(Task):  # type: ignore[misc]
        mark = "mine"

    app = adopt(Celery("own", broker="memory://", task_cls=Mine, backend="cache+memory://"))

    @app.task(shared=False)
    async def marked() -> int:
        return 1

    assert marked.mark == "mine"
    assert marked.apply().get() == 1


def test_green_threads_are_refused_with_a_clear_error() -> None:
    message = str(UnsupportedPoolError("gevent"))
    assert "prefork, threads, solo" in message
    code = (
        "import sys, types, asyncio\n"
        "fake = types.ModuleType('gevent'); monkey = types.ModuleType('gevent.monkey')\n"
        "monkey.is_module_patched = lambda name: name == 'threading'\n"
        "sys.modules.update({'gevent': fake, 'gevent.monkey': monkey})\n"
        "from celeriac import bridge\n"
        "async def body(): ...\n"
        "bridge.run(body())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].endswith(message)
