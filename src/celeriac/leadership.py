"""Which of several beats leads: a lease in a Redis, and when each entry of the schedule ran.

Nothing here trusts a clock of ours: when the lease ends is Redis's to say, and no script writes for
who leads without a look at it. The keys, after the prefix and `celeriac:beat:<name of the app>`:

    …:lease    who leads
    …:ran      entry -> when it ran last, and the id of that tick
    …:sending  entry -> the same, while it is sent by a broker that is not this Redis
"""

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

import redis
from celery import Celery
from celery.backends.redis import RedisBackend
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from celeriac import store
from celeriac.errors import CeleriacError

logger = logging.getLogger(__name__)

LEASE = 30.0  # seconds
_TIMEOUT = 2.0
_KEYS = ("lease", "ran", "sending")

# All of them: KEYS lease, ran, sending; ARGV[1] who asks.
_ASK = """
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  holder = ARGV[1]
end
local now = redis.call('TIME')
return {holder, now[1], now[2]}
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
# Entries that are no longer in the schedule are forgotten, as Celery does at its start.
_LOAD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local unsure = redis.call('HGETALL', KEYS[3])
for i = 1, #unsure, 2 do redis.call('HSET', KEYS[2], unsure[i], unsure[i + 1]) end
redis.call('DEL', KEYS[3])
local known = {}
for i = 2, #ARGV, 2 do
  redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1])
  known[ARGV[i]] = true
end
for _, name in ipairs(redis.call('HKEYS', KEYS[2])) do
  if not known[name] then redis.call('HDEL', KEYS[2], name) end
end
return {redis.call('HGETALL', KEYS[2]), unsure}
"""
_CLAIM = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[3], ARGV[2], ARGV[3]) end
return 1
"""
_SETTLE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[3], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return 1
"""
# An answer that was lost has the same message come again: what was pushed is written down. A topic
# exchange has one tick's message go to several queues.
_PUSH = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local record = cjson.decode(ARGV[3])
local before = redis.call('HGET', KEYS[2], ARGV[2])
before = before and cjson.decode(before) or {}
record.to = before.id == record.id and before.to or {}
for _, to in ipairs(record.to) do
  if to == KEYS[4] then return 1 end
end
redis.call(ARGV[4], KEYS[4], ARGV[5])
table.insert(record.to, KEYS[4])
redis.call('HSET', KEYS[2], ARGV[2], cjson.encode(record))
return 1
"""


class LostLeadershipError(CeleriacError):
    """Another beat leads; this one sends nothing."""

    def __init__(self) -> None:
        super().__init__("another beat holds the lease")


class _Tick(Protocol):
    entry: Any
    record: dict[str, Any]
    written: bool


@dataclass
class Place:
    """A Redis that the beats of an app share."""

    client: Any
    prefix: str  # of all keys of the app
    is_broker: bool
    name: str  # for people
    connection: Any = None  # kombu's, where it is the broker

    def disconnect(self) -> None:
        """Close what is open to it; another use opens it again."""
        if self.connection is not None:
            with suppress(RedisError, OSError):
                self.connection.release()
            self.client.connection_pool.disconnect()


def find_place(app: Celery, lease: float) -> Place | None:
    """The broker if it is one Redis, else the status store; None where no Redis is known."""
    timeout = min(_TIMEOUT, lease / 4)
    limits = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    connection = app.connection_for_write(
        transport_options=limits | (app.conf.broker_transport_options or {})
    )
    transport = connection.get_transport_cls()
    if issubclass(transport, kombu_redis.Transport) and len(connection.alt) < 2:
        channel = connection.channel()
        client = channel._create_client()
        client.set_retry(Retry(NoBackoff(), 0))  # the next tick is the next attempt
        return Place(client, channel.global_keyprefix, True, connection.as_uri(), connection)
    connection.release()
    if (client := store.status_client(app)) is None:
        if not isinstance(app.backend, RedisBackend):
            return None
        client = app.backend.client
    options = app.conf.result_backend_transport_options or {}
    return Place(client, options.get("global_keyprefix", ""), False, "the result backend's Redis")


class Leadership:
    """The lease, as one beat sees it. `ask` for it, and it is renewed in a thread of its own."""

    def __init__(self, place: Place, name: str, lease: float) -> None:
        self.place, self.lease = place, lease
        self.patience = min(1.0, lease / 10)  # seconds between two questions of who stands by
        # So that who stands by has it before `lease` is over, and not just asks for it then.
        self._kept = lease - self.patience
        self.me = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self.holder = ""
        self.offset = 0.0  # seconds by which our clock is ahead of Redis's
        self._until = 0.0
        self._keys = [f"{place.prefix}celeriac:beat:{name}:{key}" for key in _KEYS]
        self._renewing: threading.Thread | None = None
        self._released = threading.Event()

    def _run(self, script: str, *arguments: Any, client: Any = None, key: str = "") -> Any:
        keys = [*self._keys, self.place.prefix + key] if key else self._keys
        # Not by the client's own method: its prefix would be for the first key alone.
        run = redis.Redis.execute_command
        client = client or self.place.client
        return run(client, "EVAL", script, len(keys), *keys, self.me, *arguments)

    @property
    def held(self) -> bool:
        return time.monotonic() < self._until

    def ask(self) -> bool:
        """Whether the lease is ours now."""
        asked, before = time.monotonic(), time.time()
        holder, seconds, micros = self._run(_ASK, int(self._kept * 1000))
        self.holder = bytes_to_str(holder)
        if self.holder != self.me:
            return False
        self.offset = (before + time.time()) / 2 - int(seconds) - int(micros) / 1e6
        self._until = asked + self._kept
        if self._renewing is None or not self._renewing.is_alive():
            self._released.clear()
            self._renewing = threading.Thread(
                target=self._renew, name="celeriac-beat-lease", daemon=True
            )
            self._renewing.start()
        return True

    def _renew(self) -> None:
        # A thread of its own: sending may take longer than the lease, as when a broker is away.
        pause = self._kept / 3
        while not self._released.wait(pause):
            asked = time.monotonic()
            try:
                ours = self._run(_RENEW, int(self._kept * 1000))
            except Exception as error:  # whatever it is: the next attempt is soon
                logger.warning("beat: the lease was not renewed: %s", error)
                pause = min(self._kept / 3, 1.0)
            else:
                self._until = asked + self._kept if ours else 0.0
                pause = self._kept / 3
                if not ours:
                    return

    def release(self) -> None:
        """Let another beat lead at once."""
        self._released.set()
        if self._renewing is not None:
            self._renewing.join(_TIMEOUT)
            self._renewing = None
        if self.held:
            self._until = 0.0
            try:
                self._run(_RELEASE)
            except (RedisError, OSError) as error:
                logger.warning("beat: the lease was not given up, and ends by itself: %s", error)
        self.place.disconnect()

    def load(
        self, entries: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """When each of `entries` ran, and which were being sent when the last leader ended.

        Those of which nothing is known are written down as they are given.
        """
        arguments = [text for name, entry in entries.items() for text in (name, json.dumps(entry))]
        found = self._run(_LOAD, *arguments)
        if not found:
            raise self._lost()
        ran, unsure = ([bytes_to_str(text) for text in part] for part in found)
        records = {name: json.loads(text) for name, text in zip(ran[::2], ran[1::2], strict=True)}
        return records, unsure[::2]

    def claim(self, tick: _Tick) -> None:
        """Before anything is sent. Raises LostLeadershipError."""
        record = "" if self.place.is_broker else json.dumps(tick.record)
        if not self._run(_CLAIM, tick.entry.name, record):
            raise self._lost()

    def push(self, client: Any, command: str, key: str, message: str, tick: _Tick) -> None:
        """Write the message of `tick`, and that its entry ran. Raises LostLeadershipError."""
        record = json.dumps(tick.record)
        arguments = (tick.entry.name, record, command, message)
        if not self._run(_PUSH, *arguments, client=client, key=key):
            raise self._lost()
        tick.written = True

    def settle(self, tick: _Tick, *, gone: bool) -> None:
        """Note that `tick` was sent, or will not be; or else that it is still to be sent."""
        if tick.written or (self.place.is_broker and not gone):
            return
        try:
            self._run(_SETTLE, tick.entry.name, json.dumps(tick.record) if gone else "")
        except (RedisError, OSError) as error:
            logger.warning("beat: the end of %s was not noted: %s", tick.entry.name, error)

    def _lost(self) -> LostLeadershipError:
        self._until = 0.0
        return LostLeadershipError()
