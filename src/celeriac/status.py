"""What is known of a task: read it once, or follow it to its end without missing anything.

Every event of a task has a number, one above the last (see `events`). A follower subscribes, reads
what there is, then listens, all over one connection: what was written before the read is in the
read, what is written later is published later. Who lost the connection, or could not keep up, reads
on from the last number that it has; a number that is missing is said, never passed over.

Tasks of workers without the library have no events: what Celery publishes of them is followed.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self
from weakref import WeakKeyDictionary

from celery import Celery, states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from celeriac import records, store
from celeriac.errors import ServiceError, UnknownTaskError
from celeriac.expiry import Expiry
from celeriac.feed import Feed
from celeriac.follower import BUFFER, Follower
from celeriac.state import TERMINAL, Event, Known, States, Status

__all__ = ["TERMINAL", "Event", "Reader", "Status", "reader_of"]

logger = logging.getLogger(__name__)

HINT_AFTER = 3.0  # seconds that a task may wait before anyone is asked why
_HINT_KEPT = 10.0  # seconds
_ANSWER = 1.0  # seconds for workers to say what they listen on
_RECONCILE = 5.0  # seconds
_POLL = 0.25  # seconds between reads where the result backend cannot publish


class Reader:
    """What becomes of `app`'s tasks, for one event loop, over one connection however many follow.

    The connection opens with the first use and closes with `aclose`, or with the last follower
    where the reader was not entered (`async with`). A lost connection is made again, and every
    follower reads on from where it was. Where the result backend is no Redis the states are polled,
    and a task that is not known reads PENDING.
    """

    def __init__(self, app: Celery) -> None:
        self._app, self._states = app, States(app)
        self._followers: dict[bytes, list[Follower]] = {}  # by channel
        self._task_ids: dict[bytes, str] = {}  # by either channel
        self._snapshots: dict[asyncio.Future[Known], str] = {}
        self._feed: Feed
        self._runner: asyncio.Task[None] | None = None
        self._users = 0
        self._queues: set[str] | None = None  # on which workers listen
        self._asked = -math.inf
        self._hinting: asyncio.Task[None] | None = None
        self._expiry = Expiry(app, self._do)
        self._chores: set[asyncio.Task[Any]] = set()
        self._asking: set[asyncio.Task[Any]] = set()  # of them those with a thread
        self._reconciling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._users += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            _drop(self, self._app)
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connection. Whoever still follows comes to an end."""
        # Before the wait, in which a new user may start, with new ones.
        ended, self._followers, self._task_ids = self._followers, {}, {}
        runner, self._runner = self._runner, None
        for followers in ended.values():
            for follower in followers:
                follower.end()
        self._expiry.clear()
        self._reconciling = None
        # Of the others the thread would go on, with its connection.
        ending: list[asyncio.Task[Any]] = list(self._asking)
        for chore in self._chores - self._asking:
            chore.cancel()
        if runner is not None:
            runner.cancel()
            ending.append(runner)
        if ending:
            await asyncio.wait(ending)

    async def snapshot(self, task_id: str, timeout: float = 2.0) -> Status:
        """The state now. Raises UnknownTaskError, and ServiceError after `timeout` seconds."""
        status = await self._snapshot(task_id, timeout)
        if await self._repair(status) or await self._expiry.end(status):
            status = await self._snapshot(task_id, timeout)
        return status

    async def _repair(self, status: Status) -> bool:
        """Where states are told elsewhere than results are stored: an end that was not told.

        The status store was away when it was.
        """
        backend = self._app.backend  # of this thread: Celery makes one for each
        if status.terminal or not getattr(backend, "shows_elsewhere", False):
            return False
        try:
            repaired: bool = await asyncio.to_thread(backend.show_missed, status.task_id)
        except Exception as error:  # also of what cannot be read
            logger.warning("the result of task %s is not known: %r", status.task_id, error)
            return False
        return repaired

    async def _reconcile(self) -> None:
        while self._followers:
            await asyncio.sleep(_RECONCILE)
            for task_id in set(self._task_ids.values()):
                await self._repair(Status(task_id, states.PENDING))

    async def _snapshot(self, task_id: str, timeout: float) -> Status:
        if not self._native():
            return _sure(task_id, await asyncio.to_thread(self._states.read_blocking, task_id))
        answer: asyncio.Future[Known] = asyncio.get_running_loop().create_future()
        async with self:
            self._snapshots[answer] = task_id
            try:
                self._look_for(answer)
                async with asyncio.timeout(timeout):
                    return _sure(task_id, (await answer).status)
            except TimeoutError:
                raise ServiceError(f"the status store is silent since {timeout:g} s") from None
            finally:
                del self._snapshots[answer]

    @asynccontextmanager
    async def follow(
        self, task_id: str, after: int | None = None
    ) -> AsyncIterator[AsyncIterator[Status | Event]]:
        """What happens to a task from now on, to its terminal state, with which the iterator ends.

        It begins with the present state; given `after`, the number of an event, with what came
        after that one. Where events in between are not kept any more it begins with the present
        state, which says so (`recovered` is False). The iterator raises UnknownTaskError where
        nothing is known of the task.
        """
        if not self._native():
            yield self._poll(task_id)
            return
        channel = records.events_key_of(self._prefix, task_id).encode()
        stock = store.task_key(self._app, task_id)
        follower = Follower(lambda follower: self._read_on(follower, task_id), after)
        async with self:
            if channel not in self._followers:
                elsewhere = self._app.backend.shows_elsewhere
                if elsewhere and (self._reconciling is None or self._reconciling.done()):
                    self._reconciling = self._do(self._reconcile())
                self._followers[channel] = []
                self._task_ids[channel] = self._task_ids[stock] = task_id
                self._feed.send("SUBSCRIBE", channel, stock)
            self._followers[channel].append(follower)
            self._read_on(follower, task_id)
            try:
                yield aiter(follower)
            finally:
                followers = self._followers.get(channel, [])
                if follower in followers:  # and was not ended by `aclose`
                    followers.remove(follower)
                    if not followers:
                        del self._followers[channel], self._task_ids[channel]
                        del self._task_ids[stock]
                        self._expiry.leave(task_id)
                        self._feed.send("UNSUBSCRIBE", channel, stock)

    async def recent(
        self, owner: str, limit: int, before: str | None = None
    ) -> tuple[list[Status], str | None]:
        """The last tasks that `owner` published, the newest first, and where the next page begins.

        At most `limit`, of those that were published `before` the place that another page gave.
        """
        book = records.book_of(self._app)
        if not isinstance(book, records.Book):
            return [], None
        newest = "+" if before is None else f"({before}"
        key = records.owner_key_of(book.prefix, owner)
        try:
            found: Any = await asyncio.to_thread(book.client.xrevrange, key, newest, count=limit)
        except RedisError as error:
            raise ServiceError(f"the status store is away: {error}") from error
        ids = dict.fromkeys(fields[b"i"].decode() for _, fields in found)
        async with self:
            states = await asyncio.gather(*map(self.snapshot, ids), return_exceptions=True)
        for each in states:
            if isinstance(each, BaseException) and not isinstance(each, UnknownTaskError):
                raise each
        following = found[-1][0].decode() if len(found) == limit else None
        return [each for each in states if isinstance(each, Status)], following

    async def cancel(self, task_id: str) -> Status:
        """End a task, and give its state then; of one that has ended, its end.

        What no worker has begun is REVOKED at once, and never begins. What runs is told to stop:
        coroutines are cancelled and a prefork pool's process is ended; a thread cannot be. Raises
        UnknownTaskError, and ServiceError where the servers that it takes do not answer.
        """
        await self.snapshot(task_id)
        # Of this thread: Celery makes one for each, with connections of its own.
        await asyncio.to_thread(self._cancel, self._app.backend, task_id)
        return await self.snapshot(task_id)

    def _cancel(self, backend: Any, task_id: str) -> None:
        try:
            if not hasattr(backend, "cancel") or backend.cancel(task_id):
                self._app.control.revoke(task_id, terminate=True)
        except (RedisError, OSError, OperationalError) as error:
            raise ServiceError(f"task {task_id} may run on: {error}") from error

    async def with_hint(self, status: Status) -> Status:
        """`status`, and if it has been PENDING for a while and no worker listens on its queue: so.

        Whoever asks first may get no hint: workers are asked in the background.
        """
        record = status.record
        if status.state != states.PENDING or record is None or not record.queue:
            return status
        if time.time() - record.published < HINT_AFTER:
            return status
        now = asyncio.get_running_loop().time()
        if now - self._asked > _HINT_KEPT:
            self._asked = now
            self._hinting = self._do(asyncio.to_thread(self._ask_workers), asks=True)
        if self._queues is None and self._hinting is not None:
            await asyncio.wait([self._hinting], timeout=2 * _ANSWER)
        if self._queues is None or record.queue in self._queues:
            return status
        return replace(status, waiting=f"no worker listens on queue {record.queue!r}")

    def _ask_workers(self) -> None:
        try:
            answers = self._app.control.inspect(timeout=_ANSWER).active_queues() or {}
        except (RedisError, OSError, OperationalError) as error:
            logger.warning("no worker can be asked what it listens on: %s", error)
            self._queues = None
            return
        self._queues = {queue["name"] for queues in answers.values() for queue in queues}

    def _do(self, chore: Coroutine[Any, Any, Any], *, asks: bool = False) -> "asyncio.Task[Any]":
        """Keep a task; one that `asks` workers does so in a thread, and is never cancelled."""
        task = asyncio.create_task(chore, name="celeriac-status-chore")
        for chores in (self._chores, self._asking) if asks else (self._chores,):
            chores.add(task)
            task.add_done_callback(chores.discard)
        return task

    @property
    def _prefix(self) -> str:
        prefix: str = self._app.backend.prefix
        return prefix

    def _look_for(self, answer: asyncio.Future[Known]) -> None:
        def answered(known: Known) -> None:
            if not answer.done():
                answer.set_result(known)

        self._look(self._snapshots[answer], answered)

    def _look(self, task_id: str, then: Callable[[Known], None]) -> None:
        found: list[Any] = []

        def answered(meta: Any) -> None:
            then(self._states.known(task_id, found[0], meta))

        self._feed.send("HGETALL", records.key_of(self._prefix, task_id), reply=found.append)
        self._feed.send("GET", store.task_key(self._app, task_id), reply=answered)

    def _read_on(self, follower: Follower, task_id: str) -> None:
        """Let `follower` have what came after its last event, as much as it has room for."""
        found: list[Known] = []

        def answered(entries: Any) -> None:
            follower.asks = False
            self._take_in(follower, found[0], entries if isinstance(entries, list) else [])

        follower.asks, follower.listening = True, False
        self._look(task_id, found.append)
        first = 0 if follower.last is None else follower.last + 1
        count = 0 if follower.last is None else BUFFER
        stream = records.events_key_of(self._prefix, task_id)
        self._feed.send("XRANGE", stream, f"{first}-0", "+", "COUNT", count, reply=answered)

    def _take_in(self, follower: Follower, known: Known, entries: list[Any]) -> None:
        if known.status is None:
            follower.end(UnknownTaskError(known.task_id))
            return
        follower.listening = True
        last = follower.last
        self._expiry.watch(known.status)
        if last is None:
            follower.put(known.status)
            follower.last = known.count
            return
        if last == known.count and known.status.id is not None and known.status.terminal:
            follower.end()  # which it has seen
            return
        numbers = [int(entry[0].partition(b"-")[0]) for entry in entries]
        if last > known.count or (known.count > last and numbers[:1] != [last + 1]):
            if follower.put(replace(known.status, recovered=False)):
                follower.last = known.count
            return
        for number, (_, values) in zip(numbers, entries, strict=True):
            event = self._states.read_event(known.task_id, number, values[1])
            if event is None:
                follower.last = number
                continue
            if isinstance(event, Status) and event.state == known.status.state == states.SUCCESS:
                event = replace(event, result=known.status.result)
            if not follower.put(event):
                break
        if numbers and numbers[-1] < known.count:
            follower.listening = False  # there is more, for which it has no room now
        elif known.status.id is None and follower.differs(known.status):
            follower.put(known.status)

    def _native(self) -> bool:
        if self._runner is not None and not self._runner.done():
            return True
        connection = store.status_connection(self._app)
        if connection is None or not hasattr(self._app.backend, "prefix"):
            return False
        self._feed = Feed(connection, self._published, self._repeat)
        self._runner = asyncio.create_task(self._feed.run(), name="celeriac-status")
        return True

    def _published(self, channel: bytes, payload: bytes) -> None:
        task_id = self._task_ids.get(channel)
        if task_id is None:
            return
        if channel in self._followers:
            number, _, text = payload.partition(b" ")
            if number.isdigit():  # ours
                self._tell(task_id, self._followers[channel], int(number), text)
        else:
            own = records.events_key_of(self._prefix, task_id).encode()
            self._tell_of_stock(task_id, self._followers[own], payload)

    def _tell(self, task_id: str, followers: list[Follower], number: int, text: bytes) -> None:
        waiting = [each for each in followers if each.listening and each.last is not None]
        behind = [each for each in waiting if number > (each.last or 0)]
        if not behind:
            return
        self._expiry.leave(task_id)
        event = self._states.read_event(task_id, number, text)
        succeeded = isinstance(event, Status) and event.state == states.SUCCESS
        for follower in behind:
            if succeeded or number > (follower.last or 0) + 1:
                self._read_on(follower, task_id)  # its value is elsewhere; one was missed
            elif event is None:
                follower.last = number
            else:
                follower.put(event)

    def _tell_of_stock(self, task_id: str, followers: list[Follower], payload: bytes) -> None:
        """Of a state that Celery stored; of our workers' an event came right before."""
        self._expiry.leave(task_id)
        status: Status | None = None
        for follower in followers:
            if follower.listening:
                status = status or self._states.decode(task_id, payload)
                if follower.differs(status):
                    follower.put(status)

    def _repeat(self) -> None:
        """After a lost connection: subscribe and read on, ask again what was not answered."""
        for channel, followers in self._followers.items():
            task_id = self._task_ids[channel]
            self._feed.send("SUBSCRIBE", channel, store.task_key(self._app, task_id))
            for follower in followers:
                self._read_on(follower, task_id)
        for answer in self._snapshots:
            self._look_for(answer)

    async def _poll(self, task_id: str) -> AsyncIterator[Status]:
        last: Status | None = None
        while last is None or not last.terminal:
            status = _sure(task_id, await asyncio.to_thread(self._states.read_blocking, task_id))
            if status != last:
                last = status
                yield status
            else:
                await asyncio.sleep(_POLL)


def _sure(task_id: str, status: Status | None) -> Status:
    if status is None:
        raise UnknownTaskError(task_id)
    return status


_readers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Celery, Reader]] = WeakKeyDictionary()


def reader_of(app: Celery) -> Reader:
    """The one reader of `app`'s tasks in the running event loop, for as long as it is used."""
    readers = _readers.setdefault(asyncio.get_running_loop(), {})
    return readers.setdefault(app, Reader(app))


def _drop(reader: Reader, app: Celery) -> None:
    """Forget one that nobody uses: it holds its app and its loop, for ever if that is closed."""
    running = asyncio.get_running_loop()
    readers = _readers.get(running, {})
    if readers.get(app) is reader:
        del readers[app]
    if not readers:
        _readers.pop(running, None)
