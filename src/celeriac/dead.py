"""Dead letters: messages that will not run again by themselves, kept until somebody decides.

They are in two hashes of one Redis, the broker's or else the results': what is known of a letter,
and the message in kombu's own format, so that it can be sent again as it was.
"""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import redis
from celery import Celery, Task
from kombu import serialization
from kombu.transport.redis import Channel
from kombu.utils.json import dumps
from kombu.utils.json import loads as kombu_loads

from celeriac.errors import DeadLetterError
from celeriac.lease import execute

_KNOWN, _RAW = "celeriac:dead", "celeriac:dead:raw"


def keys(prefix: str = "") -> tuple[str, str]:
    return f"{prefix}{_KNOWN}", f"{prefix}{_RAW}"


def bury_raw(client: redis.Redis, prefix: str, letter: str, raw: bytes | str, **known: Any) -> None:
    """Keep a message as it came. The same message twice is one letter."""
    of_known, of_raw = keys(prefix)
    known |= {"size": len(raw), "time": time.time()}
    execute(client, "HSET", of_raw, letter, raw)
    execute(client, "HSET", of_known, letter, json.dumps(known))


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
        self, headers: dict[str, Any], raw: str, reason: str, queue: str | None, error: str = ""
    ) -> None:
        """Keep a task's message, by its `headers`; `raw` is as `message_of` writes it."""
        known = {"task": headers.get("task"), "queue": queue, "reason": reason}
        known |= {"error": error} if error else {}
        bury_raw(
            self._client, self._prefix, str(headers.get("id") or id_of(raw.encode())), raw, **known
        )

    def all(self) -> list[Letter]:
        """The oldest first."""
        found = self._client.hscan_iter(self._known, count=1000)
        return sorted((_letter(*each) for each in found), key=lambda letter: letter.time)

    def get(self, letter: str) -> tuple[Letter, bytes]:
        known = execute(self._client, "HGET", self._known, letter)
        raw = execute(self._client, "HGET", self._raw, letter)
        if known is None or raw is None:
            raise DeadLetterError(letter)
        return _letter(letter.encode(), known), raw

    def discard(self, letter: str) -> bool:
        execute(self._client, "HDEL", self._raw, letter)
        return bool(execute(self._client, "HDEL", self._known, letter))


def _letter(letter: bytes, known: bytes) -> Letter:
    found = json.loads(known)
    found["queue"] = found.get("queue") or found.pop("list", None)
    found.pop("list", None)
    return Letter(id=letter.decode(), **found)


@contextmanager
def letters(app: Celery) -> Iterator[Letters]:
    """Those of `app`. Raises DeadLetterError where it has no Redis to keep them."""
    with app.connection_for_write() as connection:
        if issubclass(getattr(connection.get_transport_cls(), "Channel", object), Channel):
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


def message_of(message: Any) -> str:
    """A message that arrived, as kombu's Redis transport writes one."""
    info, properties = message.delivery_info or {}, message.properties or {}
    headers = {name: each for name, each in message.headers.items() if name != "redelivered"}
    routed = {name: info.get(name) or "" for name in ("exchange", "routing_key")}
    body: Any = message.body
    body = body.encode() if isinstance(body, str) else bytes(body)
    text: str = dumps(  # type: ignore[no-untyped-call]
        {
            "body": base64.b64encode(body).decode(),
            "content-type": message.content_type,
            "content-encoding": message.content_encoding,
            "headers": headers,
            "properties": properties | {"body_encoding": "base64", "delivery_info": routed},
        }
    )
    return text


def message_of_request(task: Task, request: Any) -> str:
    """The message that a task's request came from, without its retries."""
    of_task = task.app.amqp.as_task_v2(
        request.id, task.name, request.args, request.kwargs, **{
            name: getattr(request, name) for name in _OF_REQUEST
        }, group_id=request.group,
    )  # fmt: skip
    dumped: Any = serialization.dumps
    content_type, encoding, body = dumped(of_task.body, task.app.conf.task_serializer)
    made = SimpleNamespace(
        body=body, content_type=content_type, content_encoding=encoding, headers=of_task.headers,
        properties=of_task.properties, delivery_info=request.delivery_info,
    )  # fmt: skip
    return message_of(made)


_OF_REQUEST = (
    "callbacks", "errbacks", "chord", "chain", "root_id", "parent_id", "group_index", "reply_to",
    "shadow", "ignore_result", "replaced_task_nesting",
)  # fmt: skip

# What a producer takes of a message's properties; the rest is the broker's.
_KEPT = ("correlation_id", "reply_to", "priority", "delivery_mode")


def send_again(app: Celery, letter: str) -> None:
    """Send a letter's message to where it was sent at first, with all its deliveries before it."""
    with letters(app) as kept:
        found, raw = kept.get(letter)
        if not found.readable:
            raise DeadLetterError(letter, found.reason)
        message = kombu_loads(raw.decode())  # type: ignore[no-untyped-call]
        properties, info = message["properties"], message["properties"]["delivery_info"]
        with app.connection_for_write() as connection:
            producer: Any = connection.Producer
            producer().publish(
                base64.b64decode(message["body"]),
                exchange=info["exchange"],
                routing_key=info["routing_key"],
                headers=message["headers"],
                content_type=message["content-type"],
                content_encoding=message["content-encoding"],
                **{name: properties[name] for name in _KEPT if properties.get(name) is not None},
            )
        kept.discard(letter)
