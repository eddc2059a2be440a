"""Send what is in the outbox: right after the commit, and later what was left there.

A message is sent at least once. A second one has the id of the first, and a token of its own: our
workers begin only the one that they have seen first.
"""

import asyncio
import atexit
import logging
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any

from celery import Celery
from celery.canvas import Signature
from celery.utils import uuid
from kombu.utils.json import loads
from sqlalchemy.exc import SQLAlchemyError

from celeriac import bridge, publish
from celeriac.errors import ConfigurationError, PublishError
from celeriac.outbox import CLAIM, OWN, Outbox, Row, outbox_of
from celeriac.records import ONCE, tasks_in
from celeriac.registry import Registry

logger = logging.getLogger(__name__)

_SENDING = 0.3  # seconds that whoever commits waits for the broker
_PATIENCE = 1.5  # and who has nobody waiting
_AWAY = 1.0  # seconds in which a broker that was away is not tried again by those
_SPOILT = 60.0  # seconds until what is no fault of the broker's is tried again
_LOOK_EVERY = 0.2  # seconds
_AT_ONCE = 100  # messages on their way
# Seconds between two batches on SQLite, whose writers sleep while they wait: who writes without a
# break keeps the others out.
_FAIR = 0.1
_CLOSING = 2.0  # seconds to remove what was sent


async def send(app: Celery, rows: Sequence[Row], age: float) -> None:
    """Send what has been committed, `age` seconds after it was inserted.

    Takes about a third of a second at most; what is not sent by then is sent later. Does not raise.
    """
    if not _outbox(app).relayed:
        await (await _sender(app)).send(rows, age)


async def run(app: Celery) -> None:
    """Send what is left in the outbox of `app`, for ever.

    Any number of processes may. Raises ConfigurationError if it has none.
    """
    _outbox(app)
    await (await _sender(app)).run()


def _outbox(app: Celery) -> Outbox:
    outbox = outbox_of(app)
    if outbox is None:
        raise ConfigurationError(f"{app!r} has no outbox: call celeriac.outbox.use_outbox")
    return outbox


async def _sender(app: Celery) -> "_Sender":
    return await _senders.get(app, partial(_Sender, app, _outbox(app)))


class _Sender:
    """Sends from one event loop."""

    def __init__(self, app: Celery, outbox: Outbox) -> None:
        self._app, self._outbox = app, outbox
        self._loop = asyncio.get_running_loop()
        self._away_until = 0.0  # in the loop's time, as the others
        self._follows_until = 0.0
        self._told = False  # that the broker is away
        self._sent: list[int] = []
        self._awaited: dict[int, asyncio.Event] = {}
        self._removing: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        # Or the rows of what a program has sent last would stay, and be sent again by a relay.
        atexit.unregister(bridge.close)
        atexit.register(bridge.close)

    async def send(self, rows: Sequence[Row], age: float) -> None:
        if self._loop.time() < self._away_until:
            self._follow()
            return
        try:
            async with asyncio.timeout(_SENDING):
                if age < OWN - _SENDING:
                    now = [row for row in rows if row.ordering_key is None]
                    await self._send(now, _SENDING)
                else:
                    self._follow()
                await self._in_turn([row for row in rows if row.ordering_key is not None])
        except BaseException as error:
            self._follow()
            if not isinstance(error, TimeoutError):
                raise

    async def _in_turn(self, rows: list[Row]) -> None:
        """Wait for those that have to be sent after others."""
        events = [self._awaited.setdefault(row.id, asyncio.Event()) for row in rows]
        if events:
            self._follow()
        try:
            for event in events:
                await event.wait()
        finally:
            for row in rows:
                self._awaited.pop(row.id, None)

    async def _send(self, rows: Sequence[Row], timeout: float) -> int:
        """How many of `rows` the broker has."""
        sent = 0
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            sent += sum(await asyncio.gather(*(self._send_one(row, timeout) for row in some)))
            if self._loop.time() < self._away_until:
                self._follow()
                break
        return sent

    async def _send_one(self, row: Row, timeout: float) -> bool:
        try:
            signature = _marked(row, self._app)
            await publish.aapply_async(signature, publish_timeout=timeout)
        except PublishError as error:
            if not self._told:
                logger.warning("the broker is away, the outbox keeps what is published: %s", error)
            self._told = True
            self._away_until = self._loop.time() + _AWAY
            return False
        except Exception:  # what Celery, or a signal's receiver, makes of this message
            logger.exception("task %s cannot be sent, tried again in a minute", row.task_id)
            with suppress(SQLAlchemyError, OSError):
                await self._outbox.put_off(row, _SPOILT)
            return False
        self._told = False
        self._sent.append(row.id)
        if self._removing is None or self._removing.done():
            self._removing = self._start(self._remove(), "celeriac-outbox-remove")
        if (event := self._awaited.get(row.id)) is not None:
            event.set()
        return True

    async def _remove(self) -> None:
        while self._sent:
            ids, self._sent = self._sent, []
            try:
                await self._outbox.remove(ids)
            except (SQLAlchemyError, OSError) as error:
                self._sent += ids
                logger.warning("%d sent messages stay in the outbox: %s", len(ids), error)
                await asyncio.sleep(_AWAY)

    def _follow(self) -> None:
        """Send what was left here, without waiting for a relay."""
        self._follows_until = self._loop.time() + 2 * CLAIM
        self._woken.set()
        if self._following is None or self._following.done():
            self._following = self._start(self._send_what_is_left(), "celeriac-outbox-follow")

    def _start(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        # In an empty context: what it sends is not the first caller's alone.
        return Context().run(self._loop.create_task, coroutine, name=name)

    async def _send_what_is_left(self) -> None:
        while self._loop.time() < self._follows_until:
            if await self._send_some():
                self._follows_until = self._loop.time() + 2 * CLAIM
            else:
                await self._pause()

    async def run(self) -> None:
        listening = self._start(self._listen(), "celeriac-outbox-listen")
        try:
            while True:
                if not await self._send_some():
                    await self._pause()
        finally:
            listening.cancel()

    async def _pause(self) -> None:
        away = self._away_until - self._loop.time()
        if away > 0:  # each try claims rows, which takes the database from those who commit
            await asyncio.sleep(away)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_EVERY):
                await self._woken.wait()
        self._woken.clear()

    async def _send_some(self) -> bool:
        """Send some of what nobody else is about to send; whether there may be more."""
        try:
            rows = await self._outbox.take()
        except (SQLAlchemyError, OSError) as error:
            logger.warning("the database is away, the outbox cannot be read: %s", error)
            await asyncio.sleep(_AWAY)
            return False
        sent = await self._send(rows, _PATIENCE)
        if self._removing is not None:
            await asyncio.wait([self._removing])  # those of the same key come after it
        if self._outbox.database.url.get_backend_name() == "sqlite":
            await asyncio.sleep(_FAIR)
        return sent > 0

    async def _listen(self) -> None:
        """Wake `run` where the database says that there is something."""
        while True:
            try:
                async with self._outbox.told() as told:
                    if told is None:
                        return  # it looks by itself
                    async for _ in told:
                        self._woken.set()
            except Exception as error:  # the driver's and the pool's
                logger.warning("the database is away, it tells nothing: %s", error)
            await asyncio.sleep(_AWAY)

    async def aclose(self) -> None:
        """With the loop, whose connections to the database nobody else closes."""
        self._follows_until = 0.0
        self._woken.set()
        tasks = [task for task in (self._removing, self._following) if task is not None]
        if tasks:  # cut off, they would leave connections behind
            await asyncio.wait(tasks, timeout=_CLOSING)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._outbox.database.adispose()


_senders: Registry[_Sender] = Registry()


def _marked(row: Row, app: Celery) -> Signature:
    """The signature, with a token that is this sending's in each message of it."""
    found, row.made = row.made, None  # another sending makes it anew
    if found is None:
        read = loads(row.signature)  # type: ignore[no-untyped-call]
        found = Signature.from_dict(read, app=app)
    token = uuid()
    for task in tasks_in(found):
        options = task.setdefault("options", {})
        options["headers"] = (options.get("headers") or {}) | {ONCE: token}
    return found
