"""kombu's Redis transport for workers: nothing lost, and one round trip where it has several.

Queues, unacknowledged messages and their formats are kombu's: workers and producers without the
library share them. What differs, where a worker's event loop turns:

- a script takes many messages of all queues, within the prefetch limit, and records each as
  unacknowledged before it leaves its queue; what wakes an idle worker takes nothing;
- acknowledgements are written by the same script, and those of a connection that was lost by the
  next one, since a message's tag stays the same;
- the worker's lease (see `lease`) covers what it holds: when it is gone, that returns to the queues
  within the lease, and while it lives nobody else is given it, however long a task takes.
"""

import logging
import os
import sys
from collections.abc import Iterable
from time import monotonic, time
from typing import Any

import redis
from celery.worker import state as worker_state
from kombu.connection import Connection, ConnectionPool, PooledConnection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from celeriac import dead, records, serialization
from celeriac.bell import Bell
from celeriac.holdings import Holdings
from celeriac.lease import Script
from celeriac.messages import MALFORMED

logger = logging.getLogger(__name__)

_AT_ONCE = 100  # messages
_PAUSE = 2.0  # seconds without taking any, after a refusal
_LARGEST = 16 * 2**20  # bytes of a message, as RabbitMQ has it
_SILENCE = 5.0  # seconds
_LOOK = 10.0  # seconds after which an idle worker looks by itself

# A message is recorded before it is popped: an error in between, as of a full memory, must lose
# nothing. An acknowledgement counts only while the message is ours.
_EXCHANGE = Script(
    """
local lists = #KEYS - 5
local unacked, index, held = KEYS[lists + 1], KEYS[lists + 2], KEYS[lists + 3]
local leased = ARGV[3] == '1'
for i = 5, #ARGV do
  if not leased or redis.call('HDEL', held, ARGV[i]) == 1 then
    redis.call('ZREM', index, ARGV[i])
    redis.call('HDEL', unacked, ARGV[i])
  end
end
local function read(raw)
  local properties = cjson.decode(raw).properties
  local info, tag = properties.delivery_info, properties.delivery_tag
  if type(info.exchange) ~= 'string' or type(info.routing_key) ~= 'string' then error() end
  if #tag > 255 or not string.find(tag, '^[%w%p ]+$') then error() end
  while redis.call('HEXISTS', unacked, tag) == 1 do tag = tag .. '+' end  -- a copy
  local to = cjson.encode({info.exchange, info.routing_key})
  return tag, '[' .. raw .. ',' .. string.sub(to, 2)
end
local found, left = {}, tonumber(ARGV[1])
for i = 1, lists do
  while left > 0 do
    local raw = redis.call('LINDEX', KEYS[i], -1)
    if not raw then break end
    local ok, tag, entry = false, nil, nil
    if #raw <= tonumber(ARGV[4]) then ok, tag, entry = pcall(read, raw) end
    if ok then
      if leased then redis.call('HSET', held, tag, KEYS[i]) end
      redis.call('HSET', unacked, tag, entry)
      redis.call('ZADD', index, ARGV[2], tag)
      found[#found + 1], found[#found + 2], found[#found + 3] = i, tag, raw
      left = left - 1
    else
      local id = redis.sha1hex(raw)
      redis.call('HSET', KEYS[lists + 5], id, raw)
      redis.call('HSET', KEYS[lists + 4], id, cjson.encode({
        reason = #raw > tonumber(ARGV[4]) and 'too large' or 'unreadable',
        list = KEYS[i], size = #raw, time = tonumber(ARGV[2])}))
      left = left - 1
    end
    redis.call('RPOP', KEYS[i])
  end
end
found[#found + 1] = redis.call('HLEN', held)
return found
"""
)


def _not_running(tags: Iterable[str]) -> list[str]:
    running = {request.message.delivery_tag for request in worker_state.active_requests}
    return [tag for tag in tags if tag not in running]


_holdings: dict[tuple[Any, ...], Holdings] = {}  # by server
os.register_at_fork(after_in_child=_holdings.clear)  # what the parent holds is not the child's


def _loads(raw: bytes) -> dict[str, Any]:
    """A message. Thousands may be held at once: they share the names of their headers."""
    message: dict[str, Any] = serialization.loads(raw)
    for part in ("headers", "properties"):
        found = message.get(part) or {}
        message[part] = {sys.intern(name): value for name, value in found.items()}
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
        holdings = self.channel.holdings
        if delivery_tag in holdings.mine:
            holdings.mine.remove(delivery_tag)
            holdings.acknowledged.append(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        elif delivery_tag in self._delivered:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)
        elif not self.channel.closed:
            if delivery_tag in self.channel.holdings.mine:
                self.channel.give_back([delivery_tag], last=True)
                virtual.QoS.ack(self, delivery_tag)
            elif delivery_tag in self._delivered:
                super().reject(delivery_tag, requeue=True)

    def restore_unacked(self, client: Any = None) -> None:
        holdings = self.channel.holdings
        mine = [tag for tag in self._delivered if tag in holdings.mine]
        for tag in mine:
            del self._delivered[tag]
        if self.channel.connection.client is not None:
            try:
                self.channel.give_back(_not_running(mine))
                super().restore_unacked(client)
                return
            except self.channel.connection_errors as error:
                logger.info("what has not begun is given back over the next connection: %r", error)
        # The connection was lost; without its client kombu would fail to make another one here.
        holdings.orphans.update(mine)
        holdings.unsure = True
        self._delivered.clear()

    def restore_visible(self, *args: Any, **options: Any) -> None:
        try:
            super().restore_visible(*args, **options)
        except self.channel.ResponseError as error:  # of a full memory: the next turn is soon
            logger.warning("no message whose worker is gone was looked for: %s", error)


class Channel(kombu_redis.Channel):
    QoS = QoS
    from_transport_options: Any = (*kombu_redis.Channel.from_transport_options, "max_message_size")

    max_message_size = _LARGEST
    exchanges = False  # whether a worker's event loop turns
    writes_together = True
    refused_until = 0.0
    _in_poll: Any
    _brpop_sent_at: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        self._made: tuple[Any, Any] | None = None
        self._unrecorded: set[str] = set()  # queues whose messages are gone when they are taken
        self._tracked: Any = None  # the socket on which the server says what has changed
        self._looked = 0.0
        self._watched: frozenset[str] = frozenset()  # queues that are waited for
        self._watches = False  # without taking any
        super().__init__(*args, **options)
        connection = self.connection.client
        address = connection.hostname, connection.port, connection.virtual_host
        masters = getattr(self, "master_name", None)
        self._address = (*address, masters, self.global_keyprefix, self.unacked_key)

    @property
    def holdings(self) -> Holdings:
        if self._address not in _holdings:
            prefix = self.global_keyprefix
            _holdings[self._address] = Holdings(
                self._own_client,
                prefix=f"{prefix}celeriac:{self.unacked_key}:",
                unacked=f"{prefix}{self.unacked_key}",
                index=f"{prefix}{self.unacked_index_key}",
                visibility_timeout=self.visibility_timeout,
            )
        return _holdings[self._address]

    def _connparams(self, asynchronous: bool = False) -> Any:
        if self.connection is None or self.connection.client is None:
            # kombu fails with an AttributeError here, which no retry of a publisher expects.
            raise redis.ConnectionError("the channel was closed together with its connection")
        return super()._connparams(asynchronous)

    def _own_client(self) -> redis.Redis:
        """A client of other threads, with connections of its own, that waits for nothing long."""
        pool = self._get_pool()
        unix = "path" in pool.connection_kwargs
        for name in ("socket_timeout",) if unix else ("socket_timeout", "socket_connect_timeout"):
            pool.connection_kwargs[name] = pool.connection_kwargs.get(name) or _SILENCE
        return redis.Redis(connection_pool=pool)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # whose connection is its own
            return super()._create_client(asynchronous)
        # One for all: kombu makes a new one for each message, a fifth of what it costs.
        if self._made is None or self._made[0] is not self.pool:
            self._made = (self.pool, super()._create_client())
        return self._made[1]

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        record = records.of_message(message)
        batch = options.get("_publish_batch") is not None
        if not record or batch or not self.writes_together or queue in self._expires:
            if record:
                self._write(*record)
            super()._put(queue, message, **options)
            return
        key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        key = f"{self.global_keyprefix}{key}"
        self._write(*record, ("LPUSH", key, serialization.dumps(message)))

    def _write(self, *commands: records.Command) -> None:
        """At once; the last one's error is raised, since the record is not worth a message."""
        with self._create_client().pipeline(transaction=False) as pipe:
            records.put(pipe, commands)
            *_, last = pipe.execute(raise_on_error=False)
        if isinstance(last, Exception):
            raise last

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **options: Any) -> Any:
        if no_ack:
            self._unrecorded.add(queue)
        return super().basic_consume(queue, no_ack, *args, **options)

    def exchange(self) -> bool:
        """Write what was acknowledged, take what there is for us, and say whether that was any."""
        if self.holdings.unsure:
            self._settle()
        wanted = 0
        idle = self._in_poll and not (self._watches and self.holdings.acknowledged)
        if self.active_queues and self._ours() and not idle and self.qos.can_consume():
            room = self.qos.can_consume_max_estimate()
            wanted = _AT_ONCE if room is None else min(room, _AT_ONCE)
        if not (wanted or self.holdings.acknowledged):
            return False
        queues = self._queue_cycle.consume(len(self.active_queues)) if wanted else []
        lists = [
            (self._q_for_pri(queue, pri), queue) for pri in self.priority_steps for queue in queues
        ]
        found = self._exchange([key for key, _ in lists], wanted)
        arrived = [
            (lists[place - 1][1], tag.decode(), raw)
            for place, tag, raw in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]
        for queue in {queue for queue, _, _ in arrived}:
            self._queue_cycle.rotate(queue)
        for queue, tag, raw in arrived:
            self._deliver(queue, tag, raw)
        return bool(arrived)

    def _ours(self) -> bool:
        return not self._unrecorded.intersection(self.active_queues)

    def _deliver(self, queue: str, tag: str, raw: bytes) -> None:
        self.holdings.mine.add(tag)
        self.qos.recorded.add(tag)
        try:
            message = _loads(raw)
            message["properties"]["delivery_tag"] = tag
            self.connection._deliver(message, queue)
        except MALFORMED as error:
            # Written by somebody who is no kombu: it must not end the worker, nor come again.
            logger.error("a message that cannot be read is a dead letter: %r", error)
            self._bury(raw, queue, error)
            self.qos.recorded.discard(tag)
            self.qos.ack(tag)
        else:
            message.pop("body", None)  # decoded by now; Redis keeps what may have to come again

    def _bury(self, raw: bytes, queue: str, error: Exception) -> None:
        known = {"reason": "unreadable", "queue": queue, "error": repr(error)}
        client = self._create_client()
        dead.bury_raw(client, self.global_keyprefix, dead.id_of(raw), raw, known)

    def _settle(self) -> None:
        """After a lost connection, or reply: keep what runs, give back what has not begun.

        And what the server took for us in a step whose reply did not arrive.
        """
        holdings = self.holdings
        strays = holdings.strays(self._create_client()) if holdings.leased else set()
        if strays:
            logger.warning(
                "%d messages whose arrival was not heard of are queued again", len(strays)
            )
        self.give_back([*_not_running(holdings.orphans), *strays])
        holdings.orphans.clear()
        holdings.unsure = False

    def give_back(self, tags: list[str], *, last: bool = False) -> None:
        if not self.holdings.leased:
            for tag in tags:
                kombu_redis.QoS.restore_by_tag(self.qos, tag, leftmost=last)
            self.holdings.mine.difference_update(tags)
        elif tags:
            self.holdings.give_back(self._create_client(), tags, last=last)

    def requeue(self, tags: list[str]) -> None:
        """Reject many at once, which were taken in this order."""
        mine = [tag for tag in tags if tag in self.holdings.mine]
        self.give_back(mine[::-1])
        for tag in mine:
            virtual.QoS.ack(self.qos, tag)
        for tag in set(tags).difference(mine):  # which kombu's own step had taken
            self.qos.reject(tag, requeue=True)

    def _exchange(self, lists: list[str], wanted: int) -> list[Any]:
        holdings = self.holdings
        found: list[Any]
        if holdings.lost:
            holdings.lost = False
            raise redis.ConnectionError("the lease ran out")
        tags = list(holdings.acknowledged)
        prefix = self.global_keyprefix
        leased = int(holdings.leased)
        keys = [f"{prefix}{key}" for key in lists]
        keys += [holdings.unacked, holdings.index, holdings.held, *dead.keys(prefix)]
        arguments = [wanted, time(), leased, self.max_message_size, *tags]
        try:
            found = _EXCHANGE.run(self._create_client(), keys, *arguments)
        except self.ResponseError as error:  # a full memory, say: nothing was taken
            logger.error("Redis refuses to hand out messages: %s", error)
            self.refused_until = monotonic() + _PAUSE
            return []
        except self.connection_errors:
            holdings.unsure = True
            raise
        for _ in tags:
            holdings.acknowledged.popleft()
        *found, held = found
        # More than we know of: the client asked twice, since a reply was lost.
        holdings.unsure = held > len(holdings.mine) + len(holdings.acknowledged) + len(found) // 3
        return found

    # An idle worker waits for the server to say that one of its lists has changed. kombu's BRPOP
    # takes a message, and whoever dies before it is recorded has lost it.

    def _brpop_start(self, timeout: float | None = None) -> None:
        self._watched = frozenset(self.active_queues)
        self._watches = self.exchanges and self._ours() and self._tracks()
        if not self._watches:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        lists = [self._q_for_pri(queue, pri) for pri in self.priority_steps for queue in queues]
        self._in_poll = self.client.connection
        self._brpop_sent_at = self._looked = monotonic()
        self._in_poll.send_command("EXISTS", *(f"{self.global_keyprefix}{key}" for key in lists))

    def _tracks(self) -> bool:
        connection = self.client.connection
        if self._tracked is False or self._tracked is connection._sock:
            return self._tracked is not False
        try:
            connection.send_command("CLIENT", "TRACKING", "ON")
            connection.read_response()
            self._tracked = connection._sock
        except self.ResponseError as error:  # an old server, or one that forbids it
            logger.warning("CLIENT TRACKING is refused, BRPOP has to serve: %s", error)
            self._tracked = False
        return self._tracked is not False

    def _brpop_read(self, **options: Any) -> Any:
        if not self._watches:
            return super()._brpop_read(**options)
        # What it says while nobody waits, as when no queue is left, is no answer to a BRPOP.
        connection, waited = self.client.connection, bool(self._in_poll)
        try:
            while bool(self._in_poll) == waited and connection.can_read(0):
                reply = connection.read_response(push_request=True)
                # A number of lists that hold something, or that one has changed.
                if reply == 0:
                    self._brpop_sent_at = None  # answered; from here on it is quiet
                else:
                    self._in_poll = None
        except self.connection_errors:
            self._in_poll = None
            connection.disconnect()
            raise
        if not self._in_poll:
            self._flush_brpop_reauth()
        return True

    def look_again(self) -> None:
        """Wait anew for other queues, and now and then: a connection may be lost unnoticed."""
        if not self._in_poll:
            return
        if self._watches:
            quiet = self._brpop_sent_at is None and monotonic() - self._looked > _LOOK
            if quiet or self._watched != set(self.active_queues):
                self._in_poll = None
        elif self.exchanges and self._ours() and self._watched != set(self.active_queues):
            self._in_poll.disconnect()  # a BRPOP of queues that nobody consumes any more
            self._in_poll = None

    def close(self) -> None:
        if self._watches:
            self._in_poll = None  # nothing of ours is on its way
        # Not one that sends, from whatever thread: what the worker holds is the main loop's.
        mine = self.exchanges and not self.closed and self.connection.client is not None
        if mine and self.holdings.acknowledged:
            try:
                self._exchange([], 0)
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
                channel.look_again()
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


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    from_transport_options: Any = (
        *kombu_redis.SentinelChannel.from_transport_options,
        "max_message_size",
    )


class SentinelTransport(Transport, kombu_redis.SentinelTransport):
    """For `sentinel://`."""

    Channel = SentinelChannel


_TRANSPORTS = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


def _transport_of(connection: Any) -> Any:
    return _TRANSPORTS.get(connection.transport_cls) or Connection.get_transport_cls(connection)


class RedisConnection(Connection):
    """kombu's connection, with these transports where it would use its own for Redis.

    `broker_transport = "kombu.transport.redis:Transport"` keeps kombu's.
    """

    def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802 - kombu's
        return _Pool(self, limit, **options)

    def get_transport_cls(self) -> Any:
        return _transport_of(self)


class _Pooled(PooledConnection):
    def get_transport_cls(self) -> Any:
        return _transport_of(self)


class _Pool(ConnectionPool):
    def new(self) -> Any:
        return _Pooled(self, **dict(self.connection._info(resolve=False)))
