"""The bridge from Celery's synchronous code to a loop, and the threads beside the loop."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celeriac import bridge
from celeriac.errors import BodyCancelledError
from celeriac.executor import DaemonThreads
from support import eventually


@pytest.fixture(autouse=True)
def _close_loop() -> Iterator[None]:
    yield
    bridge.close()


class Traced:
    """A call as the tracer makes it: it runs a body, and has work to do after it."""

    def __init__(self, body: Callable[[], Coroutine[Any, Any, str]]) -> None:
        self._body = body
        self.seen: list[str] = []
        self.started, self.work_done = asyncio.Event(), asyncio.Event()
        self.hosted = bridge.Hosted(self._call)

    def _call(self) -> str:
        self.seen.append("begun")
        try:
            return bridge.run_body(self._body())
        except BaseException as error:
            self.seen.append(type(error).__name__)
            raise
        finally:
            self.started.set()
            bridge.run(self.work_done.wait())
            self.seen.append("done")


async def one() -> str:
    return "value"


def test_outside_a_loop_offload_is_a_plain_call() -> None:
    assert bridge.offload(threading.current_thread) is threading.current_thread()


def test_inside_a_loop_offload_leaves_it_free_and_raises_what_was_raised() -> None:
    async def main() -> None:
        turns = asyncio.create_task(asyncio.sleep(0.01))
        go = threading.Event()
        turns.add_done_callback(lambda _: go.set())
        assert await bridge.call(lambda: bridge.offload(go.wait, 5))
        thread = await bridge.call(lambda: bridge.offload(threading.current_thread))
        assert thread is not threading.current_thread()
        with pytest.raises(ValueError, match="invalid literal"):
            await bridge.call(lambda: bridge.offload(int, "x"))

    asyncio.run(main())


def test_a_cancelled_call_goes_on_when_its_thread_has_ended() -> None:
    seen: list[str] = []

    async def main() -> None:
        begun, go = threading.Event(), threading.Event()

        def send() -> None:
            begun.set()
            assert go.wait(10)
            seen.append("sent")

        def call() -> None:
            try:
                bridge.offload(send)
            finally:
                seen.append("given back")

        task = asyncio.create_task(bridge.call(call))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == ["sent", "given back"]


def test_a_cancelled_call_that_no_thread_has_begun_is_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "_threads", DaemonThreads(1, "one"))
    seen: list[str] = []

    async def main() -> None:
        go = threading.Event()
        first = asyncio.create_task(bridge.call(lambda: bridge.offload(go.wait, 10)))
        second = asyncio.create_task(bridge.call(lambda: bridge.offload(seen.append, "made")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        assert await first
        await bridge.call(lambda: bridge.offload(int))

    asyncio.run(main())
    assert seen == []


def test_what_is_called_surely_is_called_even_for_who_was_cancelled_before() -> None:
    seen: list[str] = []

    async def main() -> None:
        threads, go = DaemonThreads(1, "one"), threading.Event()
        first = asyncio.create_task(bridge.in_thread(threads, lambda: go.wait(10)))
        surely = asyncio.create_task(
            bridge.in_thread(threads, lambda: seen.append("called"), surely=True)
        )
        await asyncio.sleep(0)
        surely.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await surely
        assert await first
        threads.shutdown()

    asyncio.run(main())
    assert seen == ["called"]


def test_a_child_that_swallows_its_cancellation_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "PATIENCE", 0.05)
    left: list[asyncio.Task[None]] = []

    async def swallow() -> None:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(30)

    async def body() -> str:
        left.append(asyncio.create_task(swallow(), name="stubborn"))
        await asyncio.sleep(0)
        return "done"

    assert bridge.run_body(body()) == "done"
    assert "stubborn" in caplog.text

    async def end() -> None:
        while not left[0].done():
            left[0].cancel()
            await asyncio.sleep(0)

    bridge.run(end())


def test_stopped_before_its_body_a_call_never_starts_it() -> None:
    async def main() -> None:
        traced = Traced(one)
        traced.work_done.set()
        assert traced.hosted.stop()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(traced.hosted.run())
        assert traced.seen == ["begun", "CancelledError", "done"]

    asyncio.run(main())


@pytest.mark.parametrize("catches", [False, True])
def test_stopped_in_its_body_a_call_cleans_up_once_and_has_no_outcome(catches: bool) -> None:
    seen = []

    async def main() -> None:
        started = asyncio.Event()

        async def body() -> str:
            try:
                started.set()
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                seen.append("cleaned up")
                if not catches:
                    raise
            return "an end of its own"

        traced = Traced(body)
        traced.work_done.set()
        task = asyncio.create_task(traced.hosted.run())
        await started.wait()
        assert traced.hosted.in_body
        assert traced.hosted.stop()
        assert not traced.hosted.stop()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert traced.seen == ["begun", "CancelledError", "done"]

    asyncio.run(main())
    assert seen == ["cleaned up"]


def test_after_its_body_a_call_is_never_cut_short() -> None:
    async def main() -> None:
        traced = Traced(one)
        task = asyncio.create_task(traced.hosted.run())
        await traced.started.wait()
        assert not traced.hosted.in_body
        assert not traced.hosted.stop()
        traced.work_done.set()
        assert await task == "value"
        assert traced.seen == ["begun", "done"]

    asyncio.run(main())


def test_what_is_thrown_is_raised_where_the_body_waits_and_may_be_caught() -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def body() -> str:
            try:
                started.set()
                await asyncio.sleep(60)
            except SoftTimeLimitExceeded:
                await asyncio.sleep(0.01)
            return "in time"

        traced = Traced(body)
        traced.work_done.set()
        task = asyncio.create_task(traced.hosted.run())
        await started.wait()
        traced.hosted.throw(SoftTimeLimitExceeded(1))
        assert await task == "in time"
        assert not task.cancelling()

    asyncio.run(main())


@pytest.mark.parametrize("outcome", ["value", "error", "cancelled"])
def test_what_a_body_started_is_cancelled_and_awaited_at_any_end_of_it(outcome: str) -> None:
    ended = []

    async def child() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append("child")

    async def body() -> str:
        children = [asyncio.create_task(child()) for _ in range(3)]
        await asyncio.sleep(0)
        if outcome == "error":
            raise KeyError(len(children))
        if outcome == "cancelled":
            raise asyncio.CancelledError
        return "value"

    if outcome == "value":
        assert bridge.run_body(body()) == "value"
    else:
        error = {"error": KeyError, "cancelled": BodyCancelledError}[outcome]
        with pytest.raises(error):
            bridge.run_body(body())
    assert ended == ["child"] * 3


def test_idle_threads_are_used_again_and_never_more_than_allowed() -> None:
    threads = DaemonThreads(3, "test-idle")
    try:
        for n in range(20):
            assert threads.submit(lambda n=n: n).result(5) == n
            eventually(lambda: threads._idle)
        assert threads.count == 1
        barrier = threading.Barrier(3)
        assert [f.result(5) for f in [threads.submit(barrier.wait, 5) for _ in range(3)]]
        assert threads.count == 3
        waiting = [threads.submit(threading.current_thread) for _ in range(20)]
        assert len({future.result(5) for future in waiting}) <= 3
        assert threads.count == 3
    finally:
        threads.shutdown()


def test_idle_threads_keep_nothing_of_what_they_did() -> None:
    class Thing:
        pass

    threads = DaemonThreads(2, "test-kept")
    try:
        thing = Thing()
        future = threads.submit(lambda given: given, thing)
        assert future.result(5) is thing
        kept = weakref.ref(thing)
        del thing, future
        eventually(lambda: gc.collect() + 1 and kept() is None)
    finally:
        threads.shutdown()


def test_a_call_that_was_cancelled_while_it_waited_does_not_run() -> None:
    threads, go = DaemonThreads(1, "test-cancelled"), threading.Event()
    try:
        threads.submit(go.wait, 5)
        ran: list[int] = []
        waiting = threads.submit(ran.append, 1)
        assert waiting.cancel()
        go.set()
        threads.submit(ran.append, 2).result(5)
        assert ran == [2]
    finally:
        threads.shutdown()


def test_the_threads_end_when_they_are_shut_down() -> None:
    threads = DaemonThreads(2, "test-ended")
    barrier = threading.Barrier(2)
    for future in [threads.submit(barrier.wait, 5) for _ in range(2)]:
        future.result(5)
    threads.shutdown()
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("test-ended")])


def test_a_call_that_ended_leaves_nothing_to_collect() -> None:
    async def main() -> None:
        await bridge.call(lambda: bridge.run(asyncio.sleep(0)))  # the first makes what stays
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await bridge.call(lambda: bridge.run(asyncio.sleep(0)))
            assert gc.collect() == 0
        finally:
            gc.enable()

    asyncio.run(main())


def test_a_loop_whose_thread_did_not_start_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> str:
        return "run"

    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", _no_new_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            bridge.run(body())
    assert bridge.run(body()) == "run"


def _no_new_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
