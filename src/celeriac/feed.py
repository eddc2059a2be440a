"""The one connection over which tasks are read and listened to: commands, replies, messages."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from celeriac.connections import disconnect
from celeriac.race import until_first

logger = logging.getLogger(__name__)

_IDLE = 15.0  # seconds without a word after which the connection is tried with a PING
_CONNECT = 2.0  # seconds for a new connection
_BACKOFF = (0.05, 2.0)  # seconds: the first wait before a new connection, and the longest
_NO_STATE = b"\xff"  # what no serializer reads


class Feed:
    """Over RESP3, where replies and messages come in the order in which the server made them.

    `heard` is called with the channel and the payload of each message, `lost` when the connection
    is about to be made again: what was sent is forgotten then.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        heard: Callable[[bytes, bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self._connection, self._heard, self._lost = connection, heard, lost
        # Commands not yet sent, and who takes the replies that are due, in order.
        self._commands: deque[tuple[bytes | int, ...]] = deque()
        self._replies: deque[Callable[[Any], None]] = deque()
        self._wake = asyncio.Event()
        self._answered = False

    def clear(self) -> None:
        self._replies.clear()
        self._commands.clear()

    def send(self, *command: bytes | str | int, reply: Callable[[Any], None] | None = None) -> None:
        # What has no UTF-8 is an error here, of who sends it; later it would cost the connection.
        self._commands.append(
            tuple(part.encode() if isinstance(part, str) else part for part in command)
        )
        if reply is not None:  # SUBSCRIBE and UNSUBSCRIBE are answered by a push
            self._replies.append(reply)
        self._wake.set()

    async def run(self) -> None:
        delay, longest = _BACKOFF
        while True:
            try:
                async with asyncio.timeout(_CONNECT):
                    await self._connection.connect()  # type: ignore[no-untyped-call]
                self._answered = False
                await until_first(status_write=self._write(), status_read=self._read())
            except (RedisError, OSError, TimeoutError) as error:
                logger.warning("the status store is away: %r; trying again in %g s", error, delay)
            except Exception:
                logger.exception("reading the status store failed; trying again in %g s", delay)
            finally:
                await disconnect(self._connection)
            if self._answered:
                delay = _BACKOFF[0]
            await asyncio.sleep(delay)
            delay = min(delay * 2, longest)
            self.clear()
            self._lost()

    async def _write(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_IDLE):
                    await self._wake.wait()
            except TimeoutError:
                self.send("PING", reply=lambda _: None)
            self._wake.clear()
            if self._commands:
                packed = self._connection.pack_commands(list(self._commands))
                self._commands.clear()
                await self._connection.send_packed_command(packed, check_health=False)

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(2 * _IDLE):  # the peer owes us a PONG by then
                    reply = await self._connection.read_response(
                        timeout=math.inf, disconnect_on_error=False, push_request=True
                    )
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                reply = _NO_STATE  # somebody else's key: the answer to one GET, no lost connection
            self._answered = True
            # A stream's entries come as a list too, of lists.
            if isinstance(reply, list) and reply and isinstance(reply[0], bytes):
                if reply[0] == b"message":
                    self._heard(reply[1], reply[2])
            else:
                self._replies.popleft()(reply)
