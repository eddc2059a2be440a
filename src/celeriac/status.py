"""What is known of a task: read its state once, or follow it to its end without missing any.

The states are those that Celery's result backend stores and publishes in one step. Subscribing,
then reading, then listening, all over one connection, leaves no moment in between: what was stored
before the read is in the read, what is stored later is published later.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from celery import Celery, states
from pydantic_core import from_json, to_json
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from celeriac import store
from celeriac.connections import disconnect
from celeriac.errors import ServiceError
from celeriac.race import until_first

logger = logging.getLogger(__name__)

TERMINAL = states.READY_STATES - {"REJECTED", "IGNORED"}
_IDLE = 15.0  # seconds without a word after which the connection is tried with a PING
_CONNECT = 2.0  # seconds for a new connection
_BACKOFF = (0.05, 2.0)  # seconds: the first wait before a new connection, and the longest
_BUFFER = 256  # states kept for a follower that does not read
_NO_STATE = b"\xff"  # what no serializer reads
_POLL = 0.25  # seconds between reads where the result backend cannot publish


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one task as anyone may see it: no traceback, no arguments."""

    task_id: str
    state: str
    result: Any = None
    """The value of a SUCCESS; what a PROGRESS, or a state of the task's own, reports."""
    error: str | None = None
    """One line: why it is FAILURE, RETRY or REVOKED."""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    def as_json(self) -> dict[str, Any]:
        """`{"task_id", "state"}`, and `"result"` or `"error"` where there is one."""
        message: dict[str, Any] = {"task_id": self.task_id, "state": self.state}
        if self.error is not None:
            message["error"] = self.error
        elif self.result is not None:
            # Celery's JSON brings dates, UUIDs, Decimals and bytes back as such; NaN is no JSON.
            message["result"] = from_json(
                to_json(self.result, inf_nan_mode="strings", bytes_mode="base64", fallback=repr)
            )
        return message

    @classmethod
    def from_meta(cls, task_id: str, meta: dict[str, Any] | None) -> Self:
        """From what Celery's backend keeps of a task; None is a task that has not begun."""
        if meta is None:
            return cls(task_id, states.PENDING)
        state, result = meta["status"], meta.get("result")
        if state in states.EXCEPTION_STATES:
            return cls(task_id, state, error=_describe(result))
        # STARTED holds the worker's process id and host: nobody's business.
        return cls(task_id, state, None if state == states.STARTED else result)


def _describe(error: Any) -> str:
    """An exception, or what Celery's JSON makes of one, in one line of bounded length."""
    if isinstance(error, dict):
        kind, message = error.get("exc_type", "Exception"), error.get("exc_message", "")
        if isinstance(message, (list, tuple)):
            message = ", ".join(map(str, message))
    else:
        kind, message = type(error).__name__, str(error)
    line = " ".join(f"{kind}: {message}".split()).removesuffix(":")
    return line if len(line) <= 500 else line[:499] + "…"


class _Follower:
    """States on their way to one reader; the oldest give way to the newest."""

    def __init__(self) -> None:
        self._states: deque[Status] = deque(maxlen=_BUFFER)
        self._arrived = asyncio.Event()
        self._last: Status | None = None
        self._ended = False
        self.listening = False  # from its first read on: what was published before is in that

    def put(self, status: Status) -> None:
        if status != self._last and not (self._last and self._last.terminal):
            self._last = status
            self._states.append(status)
            self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Status]:
        while not self._ended:
            await self._arrived.wait()
            self._arrived.clear()
            while self._states:
                status = self._states.popleft()
                yield status
                if status.terminal:
                    return


class Reader:
    """The states of `app`'s tasks, for one event loop, over one connection however many follow.

    The connection opens with the first use and closes with `aclose`, or with the last follower
    where the reader was not entered (`async with`). A lost connection is made again and every
    followed task read again. Where the result backend is no Redis the states are polled.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._followers: dict[bytes, list[_Follower]] = {}
        self._task_ids: dict[bytes, str] = {}
        self._snapshots: dict[asyncio.Future[bytes | None], bytes] = {}
        # Commands not yet sent, and who takes the replies that are due, in order.
        self._commands: deque[tuple[bytes | str, ...]] = deque()
        self._replies: deque[Callable[[bytes | None], None]] = deque()
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._answered = False
        self._users = 0

    async def __aenter__(self) -> Self:
        self._users += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connection. Whoever still follows comes to an end."""
        for followers in self._followers.values():
            for follower in followers:
                follower.end()
        runner, self._runner = self._runner, None
        # Before the wait, in which a new user may start: it shall not wait on the old one's event,
        # which also holds on to its event loop.
        self._wake = asyncio.Event()
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])

    async def snapshot(self, task_id: str, timeout: float = 2.0) -> Status:
        """The state now. Raises ServiceError if it cannot be had within `timeout` seconds."""
        if not self._native():
            return await asyncio.to_thread(self._read_backend, task_id)
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        async with self:
            self._snapshots[answer] = store.task_key(self._app, task_id)
            self._ask(answer)
            try:
                async with asyncio.timeout(timeout):
                    return self._decode(task_id, await answer)
            except TimeoutError:
                raise ServiceError(f"the status store is silent since {timeout:g} s") from None
            finally:
                del self._snapshots[answer]

    @asynccontextmanager
    async def follow(self, task_id: str) -> AsyncIterator[AsyncIterator[Status]]:
        """Every state from the present one to the terminal one, with which the iterator ends."""
        if not self._native():
            yield self._poll(task_id)
            return
        key, follower = store.task_key(self._app, task_id), _Follower()
        async with self:
            self._task_ids[key] = task_id
            if key not in self._followers:
                self._followers[key] = []
                self._send("SUBSCRIBE", key)
            self._followers[key].append(follower)
            self._read_for(follower, key)
            try:
                yield aiter(follower)
            finally:
                self._followers[key].remove(follower)
                if not self._followers[key]:
                    del self._followers[key], self._task_ids[key]
                    self._send("UNSUBSCRIBE", key)

    def _ask(self, answer: asyncio.Future[bytes | None]) -> None:
        def answered(payload: bytes | None) -> None:
            if not answer.done():
                answer.set_result(payload)

        self._send("GET", self._snapshots[answer], reply=answered)

    def _read_for(self, follower: _Follower, key: bytes) -> None:
        def answered(payload: bytes | None) -> None:
            follower.listening = True
            if key in self._task_ids:
                follower.put(self._decode(self._task_ids[key], payload))

        self._send("GET", key, reply=answered)

    def _native(self) -> bool:
        if self._runner is not None and not self._runner.done():
            return True
        connection = store.status_connection(self._app)
        if connection is None:
            return False
        self._commands.clear()
        self._replies.clear()
        self._runner = asyncio.create_task(self._run(connection), name="celeriac-status")
        return True

    def _send(
        self, *command: bytes | str, reply: Callable[[bytes | None], None] | None = None
    ) -> None:
        self._commands.append(command)
        if reply is not None:  # SUBSCRIBE and UNSUBSCRIBE are answered by a push
            self._replies.append(reply)
        self._wake.set()

    async def _run(self, connection: AbstractConnection) -> None:
        delay, longest = _BACKOFF
        while True:
            try:
                async with asyncio.timeout(_CONNECT):
                    await connection.connect()  # type: ignore[no-untyped-call]
                self._answered = False
                await until_first(
                    status_write=self._write(connection), status_read=self._read(connection)
                )
            except (RedisError, OSError, TimeoutError) as error:
                logger.warning("the status store is away: %r; trying again in %g s", error, delay)
            except Exception:
                logger.exception("reading the status store failed; trying again in %g s", delay)
            finally:
                await disconnect(connection)
            if self._answered:
                delay = _BACKOFF[0]
            await asyncio.sleep(delay)
            delay = min(delay * 2, longest)
            self._repeat()

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            try:
                async with asyncio.timeout(_IDLE):
                    await self._wake.wait()
            except TimeoutError:
                self._send("PING", reply=lambda _: None)
            self._wake.clear()
            if self._commands:
                packed = connection.pack_commands(list(self._commands))
                self._commands.clear()
                await connection.send_packed_command(packed, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            try:
                async with asyncio.timeout(2 * _IDLE):  # the peer owes us a PONG by then
                    reply = await connection.read_response(
                        timeout=math.inf, disconnect_on_error=False, push_request=True
                    )
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                reply = _NO_STATE  # somebody else's key: the answer to one GET, no lost connection
            self._answered = True
            if isinstance(reply, list):
                if reply[0] == b"message":
                    self._published(reply[1], reply[2])
            else:
                self._replies.popleft()(reply)

    def _published(self, key: bytes, payload: bytes) -> None:
        if key in self._task_ids:
            status = self._decode(self._task_ids[key], payload)
            for follower in self._followers[key]:
                if follower.listening:
                    follower.put(status)

    def _repeat(self) -> None:
        """After a lost connection: subscribe and read again, ask again what was not answered.

        A state that a follower has seen already does not reach it twice.
        """
        self._replies.clear()
        self._commands.clear()
        for key, followers in self._followers.items():
            self._send("SUBSCRIBE", key)
            for follower in followers:
                self._read_for(follower, key)
        for answer in self._snapshots:
            self._ask(answer)

    def _decode(self, task_id: str, payload: bytes | None) -> Status:
        try:
            meta = self._app.backend.decode(payload) if payload is not None else None
            return Status.from_meta(task_id, meta)
        except Exception as error:  # a serializer that this app does not accept, or no result
            logger.exception("the stored state of task %s cannot be read", task_id)
            return Status(task_id, states.FAILURE, error=f"unreadable: {_describe(error)}")

    def _read_backend(self, task_id: str) -> Status:
        return Status.from_meta(task_id, self._app.backend.get_task_meta(task_id, cache=False))

    async def _poll(self, task_id: str) -> AsyncIterator[Status]:
        last: Status | None = None
        while last is None or not last.terminal:
            status = await asyncio.to_thread(self._read_backend, task_id)
            if status != last:
                last = status
                yield status
            else:
                await asyncio.sleep(_POLL)
