"""One process that publishes, with the framework's own packages: started by the harness.

    python -m benchmarks.producer fill APP SENDER TASK ARGUMENT COUNT    fill a queue
    python -m benchmarks.producer handlers APP SENDER COUNT       50 concurrent handlers
    python -m benchmarks.producer once APP FUNCTION COUNT         all in one call
    python -m benchmarks.producer latency APP TASK COUNT          one after the other, each awaited

The last line of its output is the figures, as JSON.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from importlib import import_module
from typing import Any

import uvloop

from benchmarks.body import PAYLOAD

HANDLERS = 50
LATENCY_FIRST = 20  # round trips that are not counted: connections are made
TICK = 0.002  # seconds between two looks at the loop's lag
Send = Callable[[Any], Awaitable[Any]]


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)] if values else 0.0


async def spread(send: Send, argument: Any, count: int) -> list[float]:
    """Send `count` messages from concurrent handlers; the seconds that each call took."""
    calls: list[float] = []
    left = iter(range(count))

    async def handler() -> None:
        for _ in left:
            before = time.perf_counter()
            await send(argument)
            calls.append(time.perf_counter() - before)
            await asyncio.sleep(0)  # a request comes from the loop and goes back to it

    async with asyncio.TaskGroup() as group:
        for _ in range(HANDLERS):
            group.create_task(handler())
    return calls


async def watch_lag(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK)
        lags.append(time.perf_counter() - before - TICK)


async def fill(app: Any, sender: str, task: str, argument: str, count: int) -> dict[str, float]:
    async with getattr(app, sender)(task) as send:
        await spread(send, json.loads(argument) or PAYLOAD, count)
    return {}


async def handlers(app: Any, sender: str, count: int) -> dict[str, float]:
    async with getattr(app, sender)("noop") as send:
        await spread(send, PAYLOAD, 2 * HANDLERS)  # connections are made
        lags: list[float] = []
        watch = asyncio.create_task(watch_lag(lags))
        await asyncio.sleep(10 * TICK)
        lags.clear()
        start, used = time.perf_counter(), cpu()
        calls = await spread(send, PAYLOAD, count)
        seconds, used = time.perf_counter() - start, cpu() - used
        await asyncio.sleep(2 * TICK)  # the last lag, which blocked until now
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    return {
        "messages_per_second": count / seconds,
        "call_p50_ms": percentile(calls, 0.5) * 1e3,
        "call_p99_ms": percentile(calls, 0.99) * 1e3,
        "loop_lag_p99_ms": percentile(lags, 0.99) * 1e3,
        "cpu_us": used / count * 1e6,
    }


async def once(app: Any, function: str, count: int) -> dict[str, float]:
    publish = getattr(app, function)
    await publish(10)  # connections are made
    start, used = time.perf_counter(), cpu()
    await publish(count)
    seconds, used = time.perf_counter() - start, cpu() - used
    return {"seconds": seconds, "cpu_us": used / count * 1e6}


async def latency(app: Any, task: str, count: int) -> dict[str, float]:
    """Round trips of plain Celery's client, whichever worker answers: `delay` to `get`."""
    from benchmarks.apps import stock  # not in the peers' environments

    times: list[float] = []
    for number in range(count + LATENCY_FIRST):
        before = time.perf_counter()
        stock.app.send_task(f"{app.__name__}.{task}", (PAYLOAD,)).get(timeout=10)
        if number >= LATENCY_FIRST:
            times.append(time.perf_counter() - before)
    return {
        "round_trip_p50_ms": percentile(times, 0.5) * 1e3,
        "round_trip_p99_ms": percentile(times, 0.99) * 1e3,
    }


MODES: dict[str, Callable[..., Coroutine[Any, Any, dict[str, float]]]]
MODES = {"fill": fill, "handlers": handlers, "once": once, "latency": latency}


def main(mode: str, app: str, *arguments: str) -> None:
    module = import_module(f"benchmarks.apps.{app}")
    *names, count = arguments
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(MODES[mode](module, *names, int(count)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
