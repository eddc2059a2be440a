"""kombu's producer for Redis, whose commands go over an event loop's pipeline.

Celery's `apply_async` and kombu's transport run unmodified inside a greenlet of the caller's
asyncio task. Only the client at the very bottom differs: it hands its commands to the pipeline and
lets the caller's task wait for the reply.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.backends.rpc import RPCBackend
from kombu.connection import Connection
from kombu.messaging import Producer
from kombu.transport import redis as kombu_redis
from redis.asyncio.connection import AbstractConnection

from celeriac import bridge, records, serialization, store
from celeriac.pipeline import Command, Pipeline
from celeriac.registry import Registry

deadline: ContextVar[float] = ContextVar("celeriac_publish_deadline")  # in the loop's time


async def _reply(answer: asyncio.Future[Any]) -> Any:
    return await answer


class _Client(kombu_redis.PrefixedStrictRedis):
    """Writes and reads through the link's pipeline; its own connection pool stays unused."""

    link: "Link"

    def execute_command(self, *args: Any, **_: Any) -> Any:
        if args[0] == "PING":  # kombu's of a new channel: the pipeline tries its connection itself
            return True
        return self.link.execute(tuple(self._prefix_args(args)))

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> "_Batch":
        return _Batch(
            self.link,
            self.connection_pool,
            self.response_callbacks,
            transaction,
            shard_hint,
            global_keyprefix=self.global_keyprefix,
        )


class _Batch(kombu_redis.PrefixedRedisPipeline):
    """Several commands at once, as kombu declares a queue."""

    def __init__(self, link: "Link", *args: Any, **options: Any) -> None:
        self._link = link
        super().__init__(*args, **options)

    def execute(self, raise_on_error: bool = True) -> Any:
        commands: list[Command] = [args for args, _ in self.command_stack]
        transaction = self.explicit_transaction or self.transaction
        self.reset()
        if transaction:
            return self._link.execute(("MULTI",), *commands, ("EXEC",))
        return [self._link.execute(command) for command in commands]


class _Channel(kombu_redis.Channel):
    _made: _Client | None = None

    def _get_client(self) -> Any:
        return _Client

    def _create_client(self, asynchronous: bool = False) -> Any:
        # One for all messages: kombu makes a new one for each, a fifth of what a message costs.
        if self._made is None:
            self._made = _Client(connection_pool=self.pool, global_keyprefix=self.global_keyprefix)
        return self._made

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        client = self._create_client()
        record = records.of_message(message)
        if queue in self._expires:
            if record:
                client.link.execute(*record)
            super()._put(queue, message, **options)
        else:  # without redis-py's layers, which cost more than the command
            key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
            push = tuple(client._prefix_args(("LPUSH", key, serialization.dumps(message))))
            client.link.push(push, record)

    def new_connection(self) -> AbstractConnection:
        """To this channel's server, for an event loop; not yet open."""
        options = dict(self._connparams())
        for name in ("max_connections", "retry_on_timeout"):
            options.pop(name, None)
        kind = store.ASYNC_CONNECTIONS[options.pop("connection_class")]
        # Every command has one reply: no pushes, which RESP3 has. The reader sees a lost server.
        return store.async_connection(kind, options | {"protocol": 2, "health_check_interval": 0})


class _Transport(kombu_redis.Transport):
    Channel = _Channel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cast(Any, self.cycle).poller.close()  # for consumers; it would hold a file descriptor


class _Producer(Producer):
    """Sends once: what retries are there for, a lost connection, the pipeline handles."""

    def __init__(self, link: "Link", channel: Any) -> None:
        self._link = link
        super().__init__(channel)

    def publish(self, body: Any, *args: Any, **options: Any) -> Any:
        options["retry"] = False
        if options.get("exchange") != self._link.event_exchange:
            return super().publish(body, *args, **options)
        if self._link.begun is not None:
            self._link.begun.events.append(partial(self.publish, body, *args, **options))
            return None
        # Celery's dispatcher holds a lock meanwhile, and the message itself is sent already.
        self._link.waits = False
        try:
            return super().publish(body, *args, **options)
        finally:
            self._link.waits = True

    def may_wait(self) -> None:
        if self._link.begun is not None:
            self._link.begins = False  # nor would the next message be different
            raise MustWaitError

    def maybe_declare(self, entity: Any, retry: bool = False, **policy: Any) -> Any:
        # kombu copies a queue, to bind it to the channel, before it looks whether it is declared.
        if entity.can_cache_declaration and hash(entity) in self._link.declared:
            return False
        if self._link.begun is not None:
            raise MustWaitError
        return super().maybe_declare(entity, retry=False)


class MustWaitError(Exception):
    """A message needs more than to be written, such as a reply that names its queues."""


@dataclass(slots=True)
class Begun:
    """A message on its way: what Celery gives for it, and what follows when the broker has it."""

    deadline: float
    result: Any = None
    answer: asyncio.Future[Any] | None = None
    events: list[Callable[[], Any]] = field(default_factory=list)

    def leave(self) -> None:
        """Nobody waits for it any more: it is not written if it was not yet."""
        if self.answer is not None:
            self.answer.cancel()

    async def end(self) -> Any:
        if self.answer is not None:
            await self.answer
        if self.events:
            context = copy_context()
            context.run(deadline.set, self.deadline)
            for publish in self.events:
                context.run(publish)
        return self.result


class Link:
    """What an app needs to publish from one event loop."""

    def __init__(self, app: Celery, connection: Connection) -> None:
        self._connection = connection
        self.waits = True
        self.begun: Begun | None = None
        # What others do around the message may need to wait for replies: RPC declares a queue.
        self.begins = (
            not isinstance(app.backend, RPCBackend)
            and type(app).send_task is Celery.send_task
            and type(app.amqp).send_task_message is AMQP.send_task_message
        )
        connection.transport_cls = _Transport
        self.declared = connection.declared_entities
        channel = cast(_Channel, connection.default_channel)
        channel.client.link = self
        self.pipeline = Pipeline(channel.new_connection, self.forget)
        self.producer = _Producer(self, channel)
        self.event_exchange = app.conf.event_exchange
        # The app's own dispatcher has a lock that a thread may hold while it waits for the broker.
        dispatcher = app.events.Dispatcher(connection, enabled=False)
        self.options = {"producer": self.producer, "event_dispatcher": dispatcher}

    def begin(self, send: Callable[[], Any], due: float) -> Begun:
        """Call `send`, whose message nothing in Celery waits for then. Costs no greenlet.

        Raises MustWaitError before anything is written where that is not enough.
        """
        begun = self.begun = Begun(due)
        try:
            begun.result = send()
        finally:
            self.begun = None
        return begun

    def push(self, command: Command, before: list[Command]) -> None:
        """Write `command` after those `before`, whose replies do not matter."""
        if self.begun is None:
            self._wait_for(self.pipeline.send(command, before=before, deadline=deadline.get()))
        else:
            due = self.begun.deadline
            self.begun.answer = self.pipeline.send(command, before=before, deadline=due)

    def execute(self, *commands: Command) -> Any:
        """The reply of the last of `commands`, waited for by the asyncio task around us."""
        if self.begun is not None:
            self.begins = False  # nor would the next message be different
            raise MustWaitError
        return self._wait_for(self.pipeline.send(*commands, deadline=deadline.get()))

    def _wait_for(self, answer: asyncio.Future[Any]) -> Any:
        if self.waits:
            return bridge.run(_reply(answer))
        answer.add_done_callback(_ignore)
        return None

    def forget(self) -> None:
        """Declare queues anew, as they are once for each connection."""
        self.declared.clear()
        self._connection.transport.state.clear()

    async def aclose(self) -> None:
        await self.pipeline.aclose()


def _ignore(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()


def _native_connection(app: Celery) -> Connection | None:
    connection = app.connection_for_write()
    if connection.transport_cls not in ("redis", "rediss") or len(connection.alt) > 1:
        return None
    # That of an app which was not adopted subscribes to each result, waiting for Redis.
    if type(app.backend).on_task_call is RedisBackend.on_task_call:
        return None
    return cast(Connection, connection)


def _new_link(app: Celery) -> Link | None:
    connection = _native_connection(app)
    return Link(app, connection) if connection is not None else None


_links: Registry[Link | None] = Registry()


async def link(app: Celery) -> Link | None:
    """What `app` publishes with in the running loop; None where only threads can."""
    return await _links.get(app, partial(_new_link, app))
