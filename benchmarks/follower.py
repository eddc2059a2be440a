"""One process that sends tasks and waits to be told of their ends: started by the harness.

    python -m benchmarks.follower sockets APP TASK PORT COUNT   one at a time, over a WebSocket
    python -m benchmarks.follower polls APP TASK PORT COUNT     each asks once a second
    python -m benchmarks.follower crowd APP TASK PORT COUNT     all at once, over a WebSocket each

A body's result is the moment at which it ended, by the clock that all processes share; the figures
are from there until the terminal frame, or answer, has come. They are the last line of its output,
as JSON. `crowd` says when all sockets are open; whoever reads that starts the worker.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

import uvloop
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from benchmarks.producer import percentile

OPEN = "all are open"
LASTS = 0.025  # seconds: a socket is open by the end
FIRST = 10  # tasks that are not counted: connections are made
AT_ONCE = 20  # who polls, or opens a socket
POLL = 1.0  # seconds
DEFLATE = ClientPerMessageDeflateFactory(client_max_window_bits=True)  # what browsers offer
_ENDS = {"SUCCESS", "FAILURE", "REVOKED"}


class Socket(asyncio.Protocol):
    """A WebSocket's client without streams and queues: thousands share a process with no delay."""

    def __init__(self, url: str) -> None:
        extensions = [DEFLATE] if os.environ.get("BENCH_DEFLATE") else None
        self._protocol = ClientProtocol(parse_uri(url), extensions=extensions)
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[float] = loop.create_future()  # seconds after the body's
        self.ended = 0  # when the body did, in nanoseconds

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._protocol.send_request(self._protocol.connect())
        self._write()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._protocol.receive_data(data)
        self._write()  # a PONG
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._take(json.loads(bytes(event.data)), now)

    def _take(self, frame: dict[str, Any], now: int) -> None:
        if not self.first.done():
            self.first.set_result(None)
        if frame["state"] in _ENDS and not self.end.done():
            if frame["state"] == "SUCCESS":
                self.ended = frame["result"]
                self.end.set_result((now - self.ended) / 1e9)
            else:
                self.end.set_exception(RuntimeError(f"{frame}"))

    def connection_lost(self, error: Exception | None) -> None:
        for waits in (self.first, self.end):
            if not waits.done():
                reason = self._protocol.handshake_exc or self._protocol.close_reason
                waits.set_exception(ConnectionError(f"{reason or error}"))
                waits.exception()  # somebody may wait for the other one alone

    def _write(self) -> None:
        for data in self._protocol.data_to_send():
            self._transport.write(data)

    def close(self) -> None:
        self._transport.abort()


async def opened(port: int, task_id: str) -> Socket:
    url = f"ws://127.0.0.1:{port}/ws/task_status/{task_id}"
    loop = asyncio.get_running_loop()
    _, socket = await loop.create_connection(lambda: Socket(url), "127.0.0.1", port)
    return socket


def told(delays: list[float]) -> dict[str, float]:
    return {
        "told_p50_ms": percentile(delays, 0.5) * 1e3,
        "told_p99_ms": percentile(delays, 0.99) * 1e3,
    }


async def sockets(app: Any, task: str, port: int, count: int) -> dict[str, float]:
    delays = []
    for _ in range(FIRST + count):
        socket = await opened(port, await app.start(task, LASTS))
        delays.append(await asyncio.wait_for(socket.end, 20))
        socket.close()
    return told(delays[FIRST:])


async def polls(app: Any, task: str, port: int, count: int) -> dict[str, float]:
    delays: list[float] = []
    left = iter(range(count))

    async def poller() -> None:
        for _ in left:
            task_id = await app.start(task, LASTS)
            await asyncio.sleep(random.uniform(0, POLL))
            while True:
                answer = await got(port, f"/tasks/{task_id}")
                if answer["state"] in _ENDS:
                    break
                await asyncio.sleep(POLL)
            delays.append((time.monotonic_ns() - answer["result"]) / 1e9)

    await together(poller)
    return told(delays)


async def got(port: int, path: str) -> Any:
    """The JSON at `path`, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def crowd(app: Any, task: str, port: int, count: int) -> dict[str, float]:
    all_of_them: list[Socket] = []
    left = iter(range(count))

    async def opener() -> None:
        for _ in left:
            socket = await opened(port, await app.start(task, 0))
            await asyncio.wait_for(socket.first, 20)
            all_of_them.append(socket)

    before = time.perf_counter()
    await together(opener)
    seconds = time.perf_counter() - before
    print(OPEN, flush=True)
    delays = await asyncio.gather(*(socket.end for socket in all_of_them))
    ends = [socket.ended for socket in all_of_them]
    last = max(end + delay * 1e9 for end, delay in zip(ends, delays, strict=True))
    return {
        **told(list(delays)),
        "open_seconds": seconds,
        "all_seconds": (last - min(ends)) / 1e9,
        "work_seconds": (max(ends) - min(ends)) / 1e9,
    }


async def together(each: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(each())


MODES = {"sockets": sockets, "polls": polls, "crowd": crowd}


def main(mode: str, app: str, task: str, port: str, count: str) -> None:
    module = import_module(f"benchmarks.apps.{app}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(MODES[mode](module, task, int(port), int(count)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
