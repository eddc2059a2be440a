"""kombu's Redis transport for workers, with one round trip where it has several for each message.

Queues, unacknowledged messages and their formats are kombu's: workers and producers without the
library share them. What differs, where a worker's event loop turns:

- a script takes many messages of all queues, within the prefetch limit, and records each as
  unacknowledged before it leaves its queue; BRPOP only waits when they are empty;
- acknowledgements are written by the same script, and those of a connection that was lost by the
  next one, since a message's tag stays the same.
"""

import hashlib
import logging
import sys
from collections import deque
from time import monotonic, time
from typing import Any

import redis
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import NoScriptError

from celeriac.loop import Bell

logger = logging.getLogger(__name__)

_AT_ONCE = 100  # messages
_PAUSE = 2.0  # seconds without taking any, after a refusal
_UNREADABLE = "celeriac:unreadable"  # what is no message, as it came

# Recorded before it is popped: an error in between, as of a full memory, must lose nothing.
_EXCHANGE = """
local keys = #KEYS - 3
local unacked, index, unreadable = KEYS[keys + 1], KEYS[keys + 2], KEYS[keys + 3]
for i = 3, #ARGV do
  redis.call('ZREM', index, ARGV[i])
  redis.call('HDEL', unacked, ARGV[i])
end
local found, left = {}, tonumber(ARGV[1])
for i = 1, keys do
  while left > 0 do
    local raw = redis.call('LINDEX', KEYS[i], -1)
    if not raw then break end
    local ok, tag, entry = pcall(function()
      local properties = cjson.decode(raw).properties
      local info = properties.delivery_info
      local to = cjson.encode({info.exchange, info.routing_key})
      return properties.delivery_tag, '[' .. raw .. ',' .. string.sub(to, 2)
    end)
    if ok and type(tag) == 'string' then
      redis.call('HSET', unacked, tag, entry)
      redis.call('ZADD', index, ARGV[2], tag)
      found[#found + 1], found[#found + 2] = i, raw
      left = left - 1
    else
      redis.call('LPUSH', unreadable, raw)
    end
    redis.call('RPOP', KEYS[i])
  end
end
return found
"""
_SHA = hashlib.sha1(_EXCHANGE.encode(), usedforsecurity=False).hexdigest()

# Tags to acknowledge, by server.
_acknowledged: dict[tuple[Any, ...], deque[str]] = {}


def _loads(raw: bytes) -> dict[str, Any]:
    """A message. Thousands may be held at once: they share the names of their headers."""
    message: dict[str, Any] = loads(bytes_to_str(raw))
    for part in message.keys() & {"headers", "properties"}:
        message[part] = {sys.intern(name): value for name, value in message[part].items()}
    return message


class QoS(kombu_redis.QoS):
    """The messages that a channel holds; see `Channel.exchange`."""

    channel: "Channel"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recorded: set[str] = set()

    def can_consume(self) -> bool:
        return monotonic() >= self.channel.refused_until and super().can_consume()

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag in self.recorded:
            self.recorded.remove(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self.channel.exchanges:
            self.channel.acknowledged.append(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)
        elif not self.channel.closed:
            super().reject(delivery_tag, requeue=True)

    def restore_unacked(self, client: Any = None) -> None:
        if self.channel.connection.client is not None:
            super().restore_unacked(client)
            return
        # The connection was lost, and kombu would fail to make another one here.
        logger.warning(
            "%d messages of a lost connection were not acknowledged: they come again after the "
            "visibility timeout, unless a task that still runs acknowledges its own",
            len(self._delivered),
        )
        self._delivered.clear()

    def restore_visible(self, *args: Any, **options: Any) -> None:
        try:
            super().restore_visible(*args, **options)
        except self.channel.ResponseError as error:  # of a full memory: the next turn is soon
            logger.warning("no message whose worker is gone was looked for: %s", error)


class Channel(kombu_redis.Channel):
    QoS = QoS

    exchanges = False  # whether a worker's event loop turns
    refused_until = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        self._made: tuple[Any, Any] | None = None
        self._unrecorded: set[str] = set()  # queues whose messages are gone when they are taken
        super().__init__(*args, **options)
        server = self.connection.client
        key = (server.hostname, server.port, server.virtual_host)
        self.acknowledged = _acknowledged.setdefault(key, deque())

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # whose connection is its own
            return super()._create_client(asynchronous)
        # One for all: kombu makes a new one for each message, a fifth of what it costs.
        if self._made is None or self._made[0] is not self.pool:
            self._made = (self.pool, super()._create_client())
        return self._made[1]

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **options: Any) -> Any:
        if no_ack:
            self._unrecorded.add(queue)
        return super().basic_consume(queue, no_ack, *args, **options)

    def exchange(self) -> bool:
        """Write what was acknowledged, take what there is for us, and say whether that was any."""
        wanted = 0
        ours = not self._unrecorded.intersection(self.active_queues)
        if ours and self.active_queues and not self._in_poll and self.qos.can_consume():
            room = self.qos.can_consume_max_estimate()
            wanted = _AT_ONCE if room is None else min(room, _AT_ONCE)
        if not (wanted or self.acknowledged):
            return False
        queues = self._queue_cycle.consume(len(self.active_queues)) if wanted else []
        lists = [
            (self._q_for_pri(queue, pri), queue) for pri in self.priority_steps for queue in queues
        ]
        found = self._run([key for key, _ in lists], wanted)
        arrived = [
            (lists[place - 1][1], _loads(raw))
            for place, raw in zip(found[::2], found[1::2], strict=True)
        ]
        for queue in {queue for queue, _ in arrived}:
            self._queue_cycle.rotate(queue)
        self.qos.recorded.update(each["properties"]["delivery_tag"] for _, each in arrived)
        for queue, message in arrived:
            self.connection._deliver(message, queue)
            message.pop("body", None)  # decoded by now; Redis keeps what may have to come again
        return bool(arrived)

    def _run(self, lists: list[str], wanted: int) -> list[Any]:
        tags = list(self.acknowledged)
        keys = [*lists, self.unacked_key, self.unacked_index_key, _UNREADABLE]
        keys = [f"{self.global_keyprefix}{key}" for key in keys]
        arguments = [len(keys), *keys, wanted, time(), *tags]
        client = self._create_client()
        # Not by the client's own method: its prefix would be for the first key alone.
        run = redis.Redis.execute_command
        try:
            try:
                found = run(client, "EVALSHA", _SHA, *arguments)
            except NoScriptError:
                found = run(client, "EVAL", _EXCHANGE, *arguments)
        except self.ResponseError as error:  # a full memory, say: nothing was taken
            logger.error("Redis refuses to hand out messages: %s", error)
            self.refused_until = monotonic() + _PAUSE
            return []
        for _ in tags:
            self.acknowledged.popleft()
        return list(found)

    def close(self) -> None:
        if not self.closed and self.acknowledged and self.connection.client is not None:
            try:
                self._run([], 0)
            except self.connection_errors as error:
                logger.warning("acknowledgements wait for the next connection: %s", error)
        super().close()


class Poller(kombu_redis.MultiChannelPoller):
    exchanges = False

    def add(self, channel: Channel) -> None:
        channel.exchanges = self.exchanges
        super().add(channel)

    def turn_with(self, hub: Any) -> None:
        """Exchange messages in every turn of the worker's main loop."""
        self.exchanges = True
        for channel in self._channels:
            channel.exchanges = True
        self._bell = Bell(lambda: None)  # for another turn
        self._bell.hang_in(hub)

    def on_poll_start(self) -> None:
        # Not where somebody waits for one message, as a worker does for its neighbours' replies.
        if self.exchanges and not self._in_protected_read:
            for channel in list(self._channels):
                if channel.exchange():
                    self._bell.ring()
        super().on_poll_start()

    def close(self) -> None:
        if self.exchanges:
            self._bell.close()
        super().close()


class Transport(kombu_redis.Transport):
    """For `redis://`, `rediss://` and `redis+socket://`."""

    Channel = Channel
    cycle: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle.poller.close()
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.cycle.turn_with(loop)
        super().register_with_event_loop(connection, loop)


class RedisConnection(Connection):
    """kombu's connection, with this transport where it would use its own for Redis.

    `broker_transport = "kombu.transport.redis:Transport"` keeps kombu's.
    """

    def get_transport_cls(self) -> Any:
        if self.transport_cls in ("redis", "rediss"):
            return Transport
        return super().get_transport_cls()
