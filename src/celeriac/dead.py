"""Dead letters: messages that will not run again by themselves, kept until somebody decides.

They are in two hashes of one Redis, the broker's or else the results': what is known of a letter,
and the message in kombu's own format, so that it can be sent again as it was.
"""

import base64
import hashlib
import heapq
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, Task, states
from celery.backends.base import DisabledBackend
from kombu import serialization
from kombu.exceptions import KombuError
from kombu.transport.redis import Channel
from kombu.utils.json import dumps
from kombu.utils.json import loads as kombu_loads

from celeriac import records, runs
from celeriac.errors import DeadLetterError, PublishError
from celeriac.lease import Script, execute
from celeriac.messages import MALFORMED, is_id

_KNOWN, _RAW = "celeriac:dead", "celeriac:dead:raw"
_SERVER_TIMEOUT = 2.0  # seconds
_LONGEST = 1000  # characters of what is known of a letter
_AT_ONCE = 500  # letters

# The same message twice is one letter. Another one of the same id is another letter: neither of
# them is lost.
_BURY = Script("""
local id, raw, known = ARGV[1], ARGV[2], ARGV[3]
local old = redis.call('HGET', KEYS[2], id)
if old and old ~= raw then
  id = id .. '.' .. string.sub(redis.sha1hex(raw), 1, 8)
elseif old and ARGV[4] == '1' then
  local ok, first = pcall(cjson.decode, redis.call('HGET', KEYS[1], id) or '')
  if ok and type(first) == 'table' then
    first.time = cjson.decode(known).time
    known = cjson.encode(first)
  end
end
redis.call('HSET', KEYS[2], id, raw)
redis.call('HSET', KEYS[1], id, known)
""")

# Only while it is what was seen: a message that was sent again may be a letter again by now.
_DISCARD = Script("""
local gone = 0
for i = 1, #ARGV, 2 do
  if ARGV[i + 1] == '' or redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    gone = gone + redis.call('HDEL', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
return gone
""")


def keys(prefix: str = "") -> tuple[str, str]:
    return f"{prefix}{_KNOWN}", f"{prefix}{_RAW}"


def bury_raw(
    client: redis.Redis,
    prefix: str,
    letter: str,
    raw: bytes | str,
    known: Mapping[str, Any],
    *,
    first: bool = False,
) -> None:
    """Keep a message as it came; `first` leaves what is known of it already."""
    shortened = {name: _short(each) for name, each in known.items() if each}
    text = json.dumps(shortened | {"size": len(raw), "time": time.time()})
    _BURY.run(client, list(keys(prefix)), letter, raw, text, int(first))


def _short(value: Any) -> str:
    return str(value)[:_LONGEST]


def id_of(raw: bytes) -> str:
    """Of a message whose task is not known; Redis's scripts have the same."""
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: its id is the task's where there is one, `time` when it was buried."""

    id: str
    reason: str
    time: float
    size: int  # bytes
    task: str | None = None
    queue: str | None = None
    error: str | None = None
    seen: bytes = field(default=b"", repr=False, compare=False)

    @property
    def readable(self) -> bool:
        """Whether it is a message that can be sent again."""
        return self.task is not None


class Letters:
    """Those of one app. Raises what Redis raises, and DeadLetterError."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client, self._prefix = client, prefix
        self._known, self._raw = keys(prefix)

    def bury(
        self,
        headers: dict[str, Any],
        raw: str,
        reason: str,
        queue: str | None,
        error: str = "",
        *,
        first: bool = False,
    ) -> None:
        """Keep a task's message, by its `headers`; `raw` is as `message_of` writes it."""
        task_id, task = headers.get("id"), headers.get("task")
        letter = str(task_id) if is_id(task_id) else id_of(raw.encode())
        known = {"task": task if isinstance(task, str) else None, "queue": queue}
        known |= {"reason": reason, "error": error}
        bury_raw(self._client, self._prefix, letter, raw, known, first=first)

    def __len__(self) -> int:
        return int(execute(self._client, "HLEN", self._known))

    def each(self, task: str | None = None, reason: str | None = None) -> Iterator[Letter]:
        """In no order, a few at a time. One that moves meanwhile may come twice."""
        for name, known in self._client.hscan_iter(self._known, count=1000):
            letter = self._read(name, known)
            if task in (None, letter.task) and reason in (None, letter.reason):
                yield letter

    def newest(self, limit: int, **wanted: str | None) -> list[Letter]:
        """At most `limit` of `each`, the newest first."""
        found = heapq.nlargest(limit, self.each(**wanted), key=lambda letter: letter.time)
        return list({letter.id: letter for letter in found}.values())

    def ids(self, task: str | None = None, reason: str | None = None) -> list[str]:
        """Of all those that there are now."""
        return list({letter.id: None for letter in self.each(task, reason)})

    def get(self, letter: str) -> tuple[Letter, bytes]:
        known = execute(self._client, "HGET", self._known, letter)
        raw = execute(self._client, "HGET", self._raw, letter)
        if known is None or raw is None:
            raise DeadLetterError(letter)
        return self._read(letter.encode(), known), raw

    def discard(self, *letters: str | Letter) -> int:
        """How many there were. A Letter counts only while nothing newer has taken its place."""
        gone = 0
        pairs = [
            (each.id, each.seen) if isinstance(each, Letter) else (each, b"") for each in letters
        ]
        for start in range(0, len(pairs), _AT_ONCE):
            arguments = [each for pair in pairs[start : start + _AT_ONCE] for each in pair]
            gone += _DISCARD.run(self._client, [self._known, self._raw], *arguments)
        return gone

    def _read(self, name: bytes, known: bytes) -> Letter:
        found = json.loads(known)
        queue = found.get("queue")
        if (key := found.get("list")) is not None:  # the priority is a part of it
            queue = key.removeprefix(self._prefix).partition(Channel.sep)[0]
        return Letter(
            name.decode(errors="backslashreplace"), found.get("reason", "?"), found["time"],
            found["size"], found.get("task"), queue, found.get("error"), known,
        )  # fmt: skip


@contextmanager
def letters(app: Celery) -> Iterator[Letters]:
    """Those of `app`. Raises DeadLetterError where it has no Redis to keep them."""
    with app.connection_for_write() as connection:
        if issubclass(getattr(connection.get_transport_cls(), "Channel", object), Channel):
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_SERVER_TIMEOUT)
            channel: Any = connection.default_channel
            client = redis.Redis(connection_pool=channel._get_pool())
            try:
                yield Letters(client, channel.global_keyprefix)
            finally:
                client.close()
            return
    backend = app.backend
    if not hasattr(backend, "prefix"):
        raise DeadLetterError
    yield Letters(backend.client, backend.prefix)


# What a producer takes of a message's properties; the rest is the broker's.
KEPT = ("correlation_id", "reply_to", "priority", "delivery_mode")
# Headers that a broker writes: with them RabbitMQ would take a message for one that goes round.
_BROKERS = (
    "redelivered",
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
)


def message_of(message: Any, exchange: str | None = None, routing_key: str | None = None) -> str:
    """A message that arrived, as kombu's Redis transport writes one.

    The same message gives the same text each time, whatever it has gone through.
    """
    info, properties = message.delivery_info or {}, message.properties or {}
    headers = {
        name: each for name, each in message.headers.items() if not name.startswith(_BROKERS)
    }
    if not getattr(message, "errors", None):
        headers.pop("compression", None)  # the body is as it was before
    routed = {
        "exchange": info.get("exchange") or "" if exchange is None else exchange,
        "routing_key": info.get("routing_key") or "" if routing_key is None else routing_key,
    }
    body: Any = message.body or b""
    body = body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body)
    made = {
        "body": base64.b64encode(body).decode(),
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
        "headers": headers,
        "properties": {name: properties[name] for name in KEPT if properties.get(name) is not None}
        | {"body_encoding": "base64", "delivery_info": routed},
    }
    try:
        return _written(made)
    except MALFORMED:  # nested too deep, say
        made["headers"] = {"repr": _short(repr(list(headers)))}
        made["properties"] = {"body_encoding": "base64", "delivery_info": {}}
        return _written(made)


def _written(made: dict[str, Any]) -> str:
    text: str = dumps(made, sort_keys=True)  # type: ignore[no-untyped-call]
    return text


def message_of_request(task: Task, request: Any) -> str:
    """The message that a task's request came from, without its retries."""
    options = request.as_execution_options()
    for name in ("link", "link_error", "headers", "retries"):
        options.pop(name)
    stamps = request.stamps if request.stamped_headers else {}
    of_task = task.app.amqp.as_task_v2(
        options.pop("task_id"), task.name, request.args, request.kwargs, retries=0,
        callbacks=request.callbacks, errbacks=request.errbacks,
        ignore_result=request.ignore_result, **{**stamps, **options},
    )  # fmt: skip
    dumped: Any = serialization.dumps
    serializer = task.serializer or task.app.conf.task_serializer
    content_type, encoding, body = dumped(of_task.body, serializer)
    info = request.delivery_info or {}
    made = SimpleNamespace(
        body=body, content_type=content_type, content_encoding=encoding,
        headers=(request.headers or {}) | of_task.headers,
        properties=of_task.properties | {"priority": info.get("priority")}, delivery_info=info,
    )  # fmt: skip
    return message_of(made)


class Sender:
    """Sends letters again, over one connection, to where they were sent at first."""

    def __init__(self, app: Celery, kept: Letters) -> None:
        self._app, self._kept = app, kept
        self._connection: Any = None

    def send(self, letter: str, task_id: str | None = None) -> None:
        """Send a letter as a task that waits and has not been started. Then it is none any more.

        Given a `task_id` it is sent as another task, and the first one's end stays what it was.
        Raises DeadLetterError, or PublishError: then the letter is there still.
        """
        found, raw = self._kept.get(letter)
        try:
            message = kombu_loads(raw.decode())  # type: ignore[no-untyped-call]
            headers, info = message["headers"], message["properties"]["delivery_info"]
            to = {"exchange": info["exchange"], "routing_key": info["routing_key"]}
            body = base64.b64decode(message["body"])
        except MALFORMED:
            headers = {}
        if not found.readable or not headers:
            raise DeadLetterError(letter, found.reason)
        before = None
        if task_id is None:
            before = self._wait_anew(headers)
        else:
            headers["id"] = message["properties"]["correlation_id"] = task_id
            if (book := records.book_of(self._app)) is not None:
                book.note(headers, to["routing_key"])
        try:
            self._publish(message, body, headers, to)
        except Exception as error:
            if not isinstance(error, (redis.RedisError, KombuError, OSError, *self._errors())):
                raise
            self.close()
            if before is not None:
                self._store(headers["id"], **before)
            raise PublishError(str(error) or repr(error), task_id=letter) from error
        self._kept.discard(found)

    def _wait_anew(self, headers: dict[str, Any]) -> dict[str, Any] | None:
        """The task's state as it was, which is PENDING now; its starts are forgotten."""
        task_id = headers.get("id")
        if task_id is None:  # Celery's first protocol has it in the body
            return None
        backend = self._app.backend
        if isinstance(backend, DisabledBackend):
            return None
        if hasattr(backend, "prefix"):
            runs.forget(backend.client, backend.prefix, runs.field_of_headers(headers))
        meta = backend.get_task_meta(task_id, cache=False)
        self._store(task_id, None, states.PENDING)
        return {name: meta.get(name) for name in ("result", "status", "traceback")}

    def _store(self, task_id: str, result: Any, status: str, traceback: str | None = None) -> None:
        self._app.backend.store_result(task_id, result, status, traceback=traceback)

    def _publish(
        self, message: dict[str, Any], body: bytes, headers: dict[str, Any], to: dict[str, str]
    ) -> None:
        if self._connection is None:
            self._connection = _confirming(self._app)
        channel: Any = self._connection.default_channel
        options = {}
        if isinstance(channel, Channel):
            _require_route(self._app, channel, **to)
        elif self._connection.transport.driver_type == "amqp":
            options["mandatory"] = True  # what no queue takes comes back as an error
        properties = message["properties"]
        self._connection.Producer().publish(
            body, **to, headers=headers, content_type=message["content-type"],
            content_encoding=message["content-encoding"], **options,
            **{name: properties[name] for name in KEPT if properties.get(name) is not None},
        )  # fmt: skip

    def _errors(self) -> tuple[type[Exception], ...]:
        if self._connection is None:
            return ()
        return (*self._connection.connection_errors, *self._connection.channel_errors)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None


def _confirming(app: Celery) -> Any:
    connection = app.connection_for_write()
    if connection.transport.driver_type == "amqp":
        connection.transport_options["confirm_publish"] = True
    connection.ensure_connection(max_retries=1, interval_start=0, timeout=_SERVER_TIMEOUT)
    return connection


def _require_route(app: Celery, channel: Any, exchange: str, routing_key: str) -> None:
    """Raise KombuError where kombu would only warn, and the message would be gone."""
    if not exchange:
        return
    for queue in app.amqp.queues.values():
        if queue.exchange.name == exchange:
            queue.exchange(channel).declare()  # so that its type is known here
    table = channel.get_table(exchange)
    if not channel.typeof(exchange).lookup(table, exchange, routing_key, None):
        raise KombuError(f"no queue is bound to exchange {exchange!r} with key {routing_key!r}")


@contextmanager
def sender(app: Celery, kept: Letters) -> Iterator[Sender]:
    made = Sender(app, kept)
    try:
        yield made
    finally:
        made.close()


def send_again(app: Celery, letter: str) -> None:
    """`Sender.send` of one letter."""
    with letters(app) as kept, sender(app, kept) as sending:
        sending.send(letter)


def send_anew(app: Celery, letter: str) -> str:
    """The same as a task of its own; its id."""
    task_id = str(uuid4())
    with letters(app) as kept, sender(app, kept) as sending:
        sending.send(letter, task_id)
    return task_id
