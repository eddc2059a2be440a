"""A TCP proxy in front of a server, on which the network between the two fails as it is told to."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on `port` and passes on to the port `target` of this machine.

    What can fail:

    - `reset`: open connections end with a reset;
    - `refuse`: so do they, and there are no new ones until `heal`;
    - `swallow`: a black hole. Whatever is sent disappears, and so do the connections, those made
      until `heal` too: neither end hears of them again, not even after it;
    - `delay`: until `heal`, every piece arrives so many seconds later.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.sides: set[_Side] = set()
        self.lost: set[_Side] = set()
        self.swallows = False
        self.seconds = 0.0
        self.loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _listen(self) -> None:
        made = self.loop.create_server(lambda: _Near(self), "127.0.0.1", self.port)
        self._server = await made
        self.port = self._server.sockets[0].getsockname()[1]

    def reset(self) -> None:
        self._run(self._reset())

    async def _reset(self) -> None:
        for side in self.sides - self.lost:
            side.reset()

    def refuse(self) -> None:
        self._run(self._refuse())

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    def swallow(self) -> None:
        self.swallows = True
        self._run(self._swallow())

    async def _swallow(self) -> None:
        self.lost |= self.sides

    def delay(self, seconds: float) -> None:
        self.seconds = seconds

    def heal(self) -> None:
        self.swallows, self.seconds = False, 0.0
        if self._server is None:
            self._run(self._listen())

    def close(self) -> None:
        self._run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    async def _close(self) -> None:
        self.swallows = True
        self.lost |= self.sides  # whoever is told now must not tell the other side
        await self._refuse()
        for side in self.sides:
            side.reset()
        await asyncio.sleep(0)  # aborted transports go in the next turn of the loop
        await asyncio.sleep(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Side(asyncio.Protocol):
    """One end of a connection through the proxy."""

    transport: asyncio.Transport | None = None

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.other: _Side | None = None
        self._early: list[Callable[[], None]] = []  # until there is another end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.proxy.sides.add(self)
        if self.proxy.swallows:
            self.proxy.lost.add(self)

    def join(self, other: "_Side") -> None:
        self.other, other.other = other, self
        for each in self._early:
            each()

    def data_received(self, data: bytes) -> None:
        if self in self.proxy.lost:
            return
        if self.proxy.seconds:
            self.proxy.loop.call_later(self.proxy.seconds, self._pass, data)
        else:
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(lambda: self._pass(data))
        elif self.other.transport is not None and self not in self.proxy.lost:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.proxy.sides.discard(self)
        if self in self.proxy.lost:
            return
        if self.other is None:
            self._early.append(lambda: self.connection_lost(error))
        elif error is not None:
            self.other.reset()
        elif self.other.transport is not None:
            self.other.transport.close()

    def reset(self) -> None:
        if self.transport is not None and self in self.proxy.sides:  # else it is closed by now
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
            self.transport.abort()


class _Near(_Side):
    """The end of who connected to the proxy."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self.proxy.swallows:
            self._task = self.proxy.loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            _, far = await self.proxy.loop.create_connection(
                lambda: _Side(self.proxy), "127.0.0.1", self.proxy.target
            )
        except OSError:
            self.reset()
        else:
            self.join(far)
