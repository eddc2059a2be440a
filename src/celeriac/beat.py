"""Celery's beat, of which any number may run: one leads, the others stand by.

`beat_scheduler = "celeriac.beat:Scheduler"`. The leader holds a lease in a Redis. Where that is the
broker, a task is pushed by the script that checks the lease and writes down when its entry ran, so
that a beat that was paused, and comes back, pushes nothing. Elsewhere an entry is claimed first.
"""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from celery import Celery
from celery.beat import PersistentScheduler, ScheduleEntry, SchedulingError, beat_nodename
from celery.schedules import schedstate
from celery.schedules import schedule as interval
from celery.utils.time import maybe_make_aware
from kombu.exceptions import ChannelError, OperationalError
from kombu.utils.objects import cached_property
from redis.exceptions import RedisError

from celeriac import records
from celeriac.errors import ConfigurationError
from celeriac.health import HealthError, Report
from celeriac.leadership import LEASE, Leadership, LostLeadershipError, find_place

logger = logging.getLogger(__name__)

_LONGEST_SLEEP = 5.0  # seconds: whoever watches a beat shall see it tick
_LONGEST_PAUSE = 5.0  # seconds between two attempts to send
_SKEW = 1.0  # seconds by which two machines' clocks may differ before it counts
_AWAY = (RedisError, OSError, OperationalError, ChannelError)


@dataclass
class Tick:
    """One run of an entry that is due."""

    entry: ScheduleEntry
    id: str
    task_id: str
    record: dict[str, Any]  # what is kept of the entry once it was sent
    written: bool = False


class _FencedClient:
    """A channel's client that pushes the message of a tick only while its beat leads."""

    def __init__(self, client: Any, lead: Leadership, tick: Tick) -> None:
        self._client, self._lead, self._tick = client, lead, tick

    def lpush(self, key: str, message: str) -> None:
        self._push("LPUSH", key, message)

    def publish(self, topic: str, message: str) -> None:
        self._push("PUBLISH", topic, message)

    def _push(self, command: str, key: str, message: str) -> None:
        self._lead.push(self._client, command, key, message, self._tick)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class _FencedChannel:
    """What a Redis transport's channel is given to push ticks with; mixed into its class."""

    connection: Any
    writes_together = False  # a record and its message: that one is fenced, and pushed by itself
    _tick: Tick | None = None

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        with self._fence(message):
            super()._put(queue, message, **options)  # type: ignore[misc]

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **options: Any) -> None:
        with self._fence(message):
            super()._put_fanout(exchange, message, routing_key, **options)  # type: ignore[misc]

    @contextmanager
    def _fence(self, message: Any) -> Iterator[None]:
        # Celery's events of what was sent come over the same channel.
        tick = self.connection.client.scheduler.current
        if tick is not None and message["properties"].get("correlation_id") == tick.task_id:
            self._tick = tick
        try:
            yield
        finally:
            self._tick = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        with super().conn_or_acquire(client) as plain:  # type: ignore[misc]
            lead = self.connection.client.scheduler.leadership
            yield plain if self._tick is None else _FencedClient(plain, lead, self._tick)


def _fenced(transport: type[Any]) -> type[Any]:
    """`transport`, one of Redis, whose channels push ticks only while their beat leads."""
    channel = type("Channel", (_FencedChannel, transport.Channel), {})
    return type("Transport", (transport,), {"Channel": channel})


class Scheduler(PersistentScheduler):  # type: ignore[misc]
    """Celery's own scheduler in the beat that leads; in the others it waits."""

    app: Celery
    lease = LEASE  # seconds; `beat_lease` in the app's configuration wins
    current: Tick | None = None
    leadership: Leadership | None = None

    def __init__(self, app: Celery, *args: Any, **options: Any) -> None:
        self._attempts: dict[str, tuple[int, float]] = {}  # by entry: how many, when the next
        self._alone = self._leads = self._well = False
        self._health: Report | None = None
        self._next_report = 0.0
        self._state = ""
        super().__init__(app, *args, **options)

    # Leading

    def tick(self, *args: Any, **options: Any) -> float:
        self._report()
        try:
            if not self._alone and not self._lead():
                self._well = True
                return self._patience
            if not self._alone:
                _ = self.producer  # here, where its failure costs no tick
        except _AWAY as error:
            self._leads = self._well = False
            self._tell(logging.ERROR, f"nothing can be sent: {error}")
            return self._patience
        self._well = True
        pause: float = super().tick(*args, **options)
        return min(pause, _LONGEST_SLEEP)

    @property
    def _patience(self) -> float:
        return 1.0 if self.leadership is None else self.leadership.patience

    def _lead(self) -> bool:
        """Whether this beat is the one that sends."""
        lead = self.leadership or self._find()
        if lead is None:
            return True
        if lead.held and self._leads:
            return True
        if self._leads:
            self._leads = False
            self._tell(logging.WARNING, "the lease is lost: another beat may send now")
        if not lead.ask():
            self._tell(logging.INFO, f"standing by: {lead.holder} leads")
            return False
        self._load(lead)
        self._leads = True
        self._tell(logging.INFO, f"leading, with a lease of {lead.lease:g} s in {lead.place.name}")
        return True

    def _find(self) -> Leadership | None:
        seconds = float(self.app.conf.get("beat_lease") or self.lease)
        if not seconds > 0:
            raise ConfigurationError(f"beat_lease: expected seconds above 0, got {seconds!r}")
        place = find_place(self.app, seconds)
        if place is None:
            self._alone = True
            logger.warning(
                "beat: neither the broker nor the result backend is a Redis, so a second beat "
                "would double every task: make the result backend one, or run one beat"
            )
            return None
        self.leadership = Leadership(place, self.app.main or "", seconds)
        return self.leadership

    def _tell(self, level: int, state: str) -> None:
        if state != self._state:
            self._state = state
            logger.log(level, "beat: %s", state)

    def _report(self) -> None:
        """For `celeriac health beat`: that it ticks, and whether it would send what is due."""
        if (now := time.monotonic()) < self._next_report:
            return
        self._next_report = now + 1.0
        try:
            if self._health is None:
                self._health = Report("beat", beat_nodename())
            self._health.write("" if self._well else self._state or "it is starting")
        except (HealthError, OSError) as error:
            self._next_report = now + 60.0
            logger.warning("`celeriac health beat` will find nothing: %s", error)

    def close(self) -> None:
        if self._health is not None:
            self._health.remove()
        self._leads = False
        if self.leadership is not None:
            self.leadership.release()
        super().close()

    # When each entry ran

    def _load(self, lead: Leadership) -> None:
        """Go on where the beat that led before has ended: no entry is sent again, none left out."""
        own = {name: self._record(entry) for name, entry in self.schedule.items()}
        found, unsure = lead.load(own)
        for name, entry in self.schedule.items():
            self._follow(entry, found[name])
        for name in unsure:
            logger.warning(
                "beat: %s was being sent when the beat that led ended; whether it was is not "
                "known, and it is not sent again",
                name,
            )
        self._heap = None

    def _record(self, entry: ScheduleEntry, tick_id: str = "") -> dict[str, Any]:
        assert self.leadership is not None
        return {
            "last": entry.last_run_at.isoformat(),
            "count": entry.total_run_count,
            "offset": self.leadership.offset,
            "id": tick_id,
        }

    def _follow(self, entry: ScheduleEntry, record: dict[str, Any]) -> None:
        assert self.leadership is not None
        last = datetime.fromisoformat(record["last"])
        if last.tzinfo is not None:
            last = last.astimezone(self.app.timezone)
        skew = record["offset"] - self.leadership.offset
        # A date is the same on every clock; how long ago something was, is not.
        ago = isinstance(entry.schedule, interval) and not entry.schedule.relative
        if ago and abs(skew) > _SKEW:
            logger.warning("beat: another beat's clock is %.1f s ahead of this one's", skew)
            last -= timedelta(seconds=skew)
        # Redis may have lost what this beat knows, if it sent the entry itself.
        own = maybe_make_aware(entry.last_run_at)
        if not entry.total_run_count or maybe_make_aware(last) > own:
            entry.last_run_at = last
            entry.total_run_count = max(record["count"], entry.total_run_count)

    def _due_at(self, entry: ScheduleEntry) -> datetime:
        now = entry.default_now()
        frozen = copy.copy(entry.schedule)
        frozen.app, frozen.nowfun = self.app, lambda: now
        try:
            due: datetime = now + frozen.remaining_estimate(entry.last_run_at)
        except Exception:  # a schedule of somebody's own needs no more than `is_due`
            due = entry.last_run_at
        return maybe_make_aware(due)  # type: ignore[no-any-return]

    # Sending

    def is_due(self, entry: ScheduleEntry) -> Any:
        _, not_before = self._attempts.get(entry.name, (0, 0.0))
        left = not_before - time.monotonic()
        return schedstate(False, left) if left > 0 else super().is_due(entry)

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        with records.as_owner(records.SYSTEM):
            self._apply_entry(entry, producer)

    def _apply_entry(self, entry: ScheduleEntry, producer: Any) -> None:
        if (lead := self.leadership) is None:
            super().apply_entry(entry, producer=producer)
            return
        tick = self._tick(entry)
        try:
            lead.claim(tick)
        except LostLeadershipError:
            self._put_back(entry)
        except _AWAY as error:
            self._tell(logging.ERROR, f"nothing can be sent: {error}")
            self._postpone(entry)
        else:
            self.current = tick
            try:
                super().apply_entry(entry, producer=producer)
            finally:
                self.current = None

    def _tick(self, entry: ScheduleEntry) -> Tick:
        due = self._due_at(entry).astimezone(self.app.timezone)
        name = f"celeriac:beat:{self.app.main}:{entry.name}:{due.timestamp():.6f}"
        tick_id = str(uuid5(NAMESPACE_URL, name))
        record = self._record(self.schedule[entry.name], tick_id)
        return Tick(entry, tick_id, entry.options.get("task_id") or tick_id, record)

    def apply_async(
        self, entry: ScheduleEntry, producer: Any = None, advance: bool = True, **options: Any
    ) -> Any:
        tick, lead = self.current, self.leadership
        if tick is None or lead is None or tick.entry is not entry:
            return super().apply_async(entry, producer=producer, advance=advance, **options)
        headers = dict(entry.options.get("headers") or {})
        with_id = entry.options | {"task_id": tick.task_id, "headers": headers}
        named = type(entry)(**dict(entry, options=with_id))
        try:
            result = super().apply_async(named, producer=producer, advance=False, **options)
        except SchedulingError as error:
            # What fails for a reason of its own, as arguments that are no JSON, would fail again.
            passing = isinstance(error.__context__, (*_AWAY, LostLeadershipError))
            if passing:
                self._postpone(entry)
            lead.settle(tick, gone=not passing)
            raise
        lead.settle(tick, gone=True)
        self._attempts.pop(entry.name, None)
        return result

    def _postpone(self, entry: ScheduleEntry) -> None:
        tries, _ = self._attempts.get(entry.name, (0, 0.0))
        pause = min(2.0**tries, _LONGEST_PAUSE)
        self._attempts[entry.name] = (tries + 1, time.monotonic() + pause)
        self._put_back(entry)
        self._disconnect()

    def _put_back(self, entry: ScheduleEntry) -> None:
        """Have `entry`, which Celery has moved on to its next run, due as it was."""
        self.schedule[entry.name] = entry
        self._heap = None

    # The connection

    @cached_property
    def connection(self) -> Any:
        connection = self.app.connection_for_write()
        if self.leadership is not None and self.leadership.place.is_broker:
            connection.scheduler = self
            connection.transport_cls = _fenced(connection.get_transport_cls())
        return connection

    def _ensure_connected(self) -> Any:
        if self.leadership is None:
            return super()._ensure_connected()
        # Once: the next tick is the next attempt, and stays one of a beat that ticks.
        return self.connection.ensure_connection(max_retries=1, interval_start=0)

    def _disconnect(self) -> None:
        self.__dict__.pop("producer", None)
        if (connection := self.__dict__.pop("connection", None)) is not None:
            try:
                connection.release()
            except Exception as error:  # it is lost anyway
                logger.debug("beat: %s", error)
