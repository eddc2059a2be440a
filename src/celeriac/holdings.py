"""What this worker process holds of a Redis broker's messages, and what becomes of it.

Beside kombu's `unacked`, each holder has a hash of the tags that it holds and the lists they came
from; its lease says for how long they are its own.
"""

import logging
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, time

import redis
from kombu.utils import json

from celeriac import lease
from celeriac.lease import Script, execute
from celeriac.messages import MALFORMED

logger = logging.getLogger(__name__)

_AT_ONCE = 100  # messages

# Of a holder that is gone (ARGV[1]), or else our own.
_REQUEUE = Script("""
local held, unacked, index, gone = unpack(KEYS)
if ARGV[1] ~= '' and not redis.call('ZSCORE', gone, ARGV[1]) then return -1 end
local requeued = 0
for i = 3, #ARGV, 2 do
  local list = redis.call('HGET', held, ARGV[i])
  if list then
    if redis.call('HEXISTS', unacked, ARGV[i]) == 1 then
      redis.call(ARGV[2], list, ARGV[i + 1])
      requeued = requeued + 1
    end
    redis.call('HDEL', unacked, ARGV[i])
    redis.call('ZREM', index, ARGV[i])
    redis.call('HDEL', held, ARGV[i])
  end
end
return requeued
""")

# For workers without leases, who give back what is older than their visibility timeout.
_TOUCH = Script("""
local tags = redis.call('HKEYS', KEYS[1])
for _, tag in ipairs(tags) do redis.call('ZADD', KEYS[2], 'XX', ARGV[1], tag) end
return #tags
""")


class Holdings:
    """Messages of one server; they outlive connections, as their tags do.

    `prefix`, `unacked` and `index` are keys; `client` has connections of its own.
    """

    def __init__(
        self,
        client: Callable[[], redis.Redis],
        *,
        prefix: str,
        unacked: str,
        index: str,
        visibility_timeout: float,
    ) -> None:
        self.acknowledged: deque[str] = deque()
        self.mine: set[str] = set()  # taken and not acknowledged
        self.orphans: set[str] = set()  # of those, what came over a connection that was lost
        self.unsure = False  # whether the server may have us hold something else
        self.lost = False
        self._prefix, self.unacked, self.index = prefix, unacked, index
        self._touched, self._touch_every = monotonic(), visibility_timeout / 10
        self._client = client
        self._lease: lease.Lease | None = None

    @property
    def leased(self) -> bool:
        """Whether what is held is covered by a lease, as in every worker of an adopted app."""
        # A worker's keeper comes after its first connection, over which nothing is taken.
        if self._lease is None and lease.process.keeper is not None:
            self._begin(lease.process.keeper)
        return self._lease is not None

    def _begin(self, keeper: lease.Keeper) -> None:
        self._lease = lease.Lease(self._client(), self._prefix, keeper.seconds)
        keeper.add(lease.Holding(self._lease, self._lose, self._take_over, self._touch))

    @property
    def held(self) -> str:
        return self._held_by(self._lease.holder) if self._lease is not None else self._prefix

    def _held_by(self, holder: str) -> str:
        return f"{self._prefix}held:{holder}"

    def _lose(self) -> None:
        self.lost = True  # which the main thread notices, as it would the loss of its connection

    def _touch(self) -> None:
        assert self._lease is not None
        if monotonic() - self._touched >= self._touch_every:
            _TOUCH.run(self._lease.client, [self.held, self.index], time())
            self._touched = monotonic()

    def _take_over(self, holder: str) -> None:
        assert self._lease is not None
        client, held = self._lease.client, self._held_by(holder)
        tags = [tag.decode() for tag in execute(client, "HKEYS", held)]
        requeued = self._requeue(client, held, tags, gone=holder)
        if requeued:
            logger.warning(
                "worker %s is gone: %d of its messages are queued again", holder, requeued
            )

    def strays(self, client: redis.Redis) -> set[str]:
        """Tags that the server has us hold, and that never arrived."""
        held = {tag.decode() for tag in execute(client, "HKEYS", self.held)}
        return held - self.mine - set(self.acknowledged)

    def give_back(self, client: redis.Redis, tags: list[str], *, last: bool = False) -> None:
        """Put messages, those that are still ours, back at the heads of their queues, or `last`."""
        self._requeue(client, self.held, tags, push="LPUSH" if last else "RPUSH")
        self.mine.difference_update(tags)

    def _requeue(
        self, client: redis.Redis, held: str, tags: list[str], gone: str = "", push: str = "RPUSH"
    ) -> int:
        assert self._lease is not None
        requeued = 0
        for first in range(0, len(tags), _AT_ONCE):
            some = tags[first : first + _AT_ONCE]
            entries = execute(client, "HMGET", self.unacked, *some)
            raw = [_redelivered(entry) if entry else b"" for entry in entries]
            arguments = [each for pair in zip(some, raw, strict=True) for each in pair]
            keys = [held, self.unacked, self.index, self._lease.keys[1]]
            requeued += max(0, _REQUEUE.run(client, keys, gone, push, *arguments))
        return requeued


def _redelivered(entry: bytes) -> bytes | str:
    """The message of an entry of `unacked`, marked as kombu marks those that it restores."""
    try:
        message, _, _ = json.loads(entry.decode())  # type: ignore[no-untyped-call]
        with suppress(KeyError, TypeError):  # of a message that no kombu has written
            message["headers"]["redelivered"] = True
            message["properties"]["delivery_info"]["redelivered"] = True
        text: str = json.dumps(message)  # type: ignore[no-untyped-call]
    except MALFORMED:
        found = _ENTRY.fullmatch(entry)
        return found[1] if found else entry  # for whoever takes it to put aside
    return text


_STRING = rb'\s*"(?:[^"\\]|\\.)*"'
_ENTRY = re.compile(rb"\[(.*)," + _STRING + b"," + _STRING + rb"\]", re.DOTALL)
