"""Leases in Redis: what a process holds is its own for as long as it renews, from a thread.

A thread, because an event loop or a main thread that is blocked must not lose what it holds. All
times are the server's: no clock of any worker counts.
"""

import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import redis
from redis.exceptions import NoScriptError, RedisError

logger = logging.getLogger(__name__)

SECONDS = 30.0
_AGAIN = 1.0  # seconds after which a renewal that failed is tried again
_ENDING = 1.0  # seconds for the last calls
_LONGEST = 4.0  # seconds between two looks for those that are gone

# The server's time in milliseconds, as `now`.
NOW = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
"""


# Not the client's own, where kombu adds a prefix to the first key alone.
execute: Any = redis.Redis.execute_command


class Script:
    """Lua that runs by its hash, sent whole where the server does not know it yet."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: redis.Redis, keys: list[str], *arguments: Any) -> Any:
        try:
            return execute(client, "EVALSHA", self.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return execute(client, "EVAL", self.source, len(keys), *keys, *arguments)


_RENEW = Script(
    NOW
    + """
local held = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return held and 1 or 0
"""
)

# Those whose lease ran out are noted as gone, so that they cannot come back unnoticed while what
# they held is given away.
_GONE = Script(
    NOW
    + """
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], holder)
  redis.call('ZADD', KEYS[2], now, holder)
end
return redis.call('ZRANGE', KEYS[2], 0, -1)
"""
)

_RELEASE = Script(
    NOW
    + """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now, ARGV[1])
"""
)


class Lease:
    """This process's lease among those of all holders under `name`."""

    def __init__(self, client: redis.Redis, name: str, seconds: float) -> None:
        self.client, self.seconds = client, seconds
        self.holder = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.keys = [f"{name}leases", f"{name}gone"]
        self._begun = False

    def renew(self) -> bool:
        """Whether it was ours all the time; if not, it is again from now on."""
        held = _RENEW.run(self.client, self.keys, self.holder, round(self.seconds * 1000))
        first, self._begun = not self._begun, True
        return bool(held) or first

    def gone(self) -> list[str]:
        """Holders whose lease ran out and whose holdings are not given away yet."""
        return [holder.decode() for holder in _GONE.run(self.client, self.keys)]

    def forget(self, holder: str) -> None:
        execute(self.client, "ZREM", self.keys[1], holder)

    def release(self) -> None:
        """End it at once: what was not given back is for others to see to."""
        _RELEASE.run(self.client, self.keys, self.holder)


@dataclass(eq=False)
class Holding:
    """A lease, and what is to be done about it; all on the keeper's thread."""

    lease: Lease
    lost: Callable[[], None]
    """It ran out: others may have given away what was held."""
    take_over: Callable[[str], None]
    """Give away, or end, what a holder that is gone held; again if it raised."""
    renewed: Callable[[], None] = lambda: None
    since: float | None = None  # when it began to be renewed without a failure
    due: float = 0.0


class Keeper:
    """Renews the leases of this process, and sees to what those held whose process is gone."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._every = min(seconds / 3, _LONGEST)
        self._holdings: list[Holding] = []
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, holding: Holding) -> None:
        """Renew it from now on, a first time here if its server answers."""
        self._renew(holding)
        with self._lock:
            self._holdings.append(holding)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celeriac-lease", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Release all leases; of servers that do not answer at once, they are left to run out."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_ENDING)

    def _run(self) -> None:
        while not self._stopping:
            now = monotonic()
            with self._lock:
                due = [each for each in self._holdings if each.due <= now]
            for holding in due:
                self._renew(holding)
            with self._lock:
                following = min((each.due for each in self._holdings), default=now + 1)
            self._wake.wait(max(0.0, following - monotonic()))
            self._wake.clear()
        for holding in self._holdings:
            try:
                holding.lease.release()
            except RedisError as error:
                logger.warning("a lease is left to run out: %s", error)
            holding.lease.client.close()
        self._holdings.clear()

    def _renew(self, holding: Holding) -> None:
        try:
            if not holding.lease.renew():
                logger.error("a lease ran out; what was held may be with others by now")
                holding.lost()
            holding.renewed()
            # After an outage the others, too, get the time to renew before they count as gone.
            if holding.since is None:
                holding.since = monotonic()
            if monotonic() - holding.since >= self.seconds / 3:
                for holder in holding.lease.gone():
                    holding.take_over(holder)
                    holding.lease.forget(holder)
            holding.due = monotonic() + self._every
        except Exception as error:
            if holding.since is not None or holding.due == 0.0 or not isinstance(error, RedisError):
                logger.warning("a lease is not renewed: %r; trying on", error)
            holding.since = None
            holding.due = monotonic() + min(_AGAIN, self._every)


class _Process:
    """The keeper of this worker's main process; elsewhere there is none."""

    keeper: Keeper | None = None

    def keep(self, seconds: float) -> Keeper:
        """Hold leases until `stop`."""
        self.keeper = Keeper(seconds)
        return self.keeper

    def stop(self) -> None:
        stopped, self.keeper = self.keeper, None
        if stopped is not None:
            stopped.stop()

    def forget(self) -> None:
        self.keeper = None  # whose thread, and leases, are the parent's


process = _Process()
os.register_at_fork(after_in_child=process.forget)
