"""What a worker believes of a message, and what it refuses."""

import json
from typing import Any

import pytest
from celery import Celery, chord, group
from celery.exceptions import InvalidTaskError
from kombu.exceptions import DecodeError
from kombu.message import Message

from celeriac import messages
from celeriac.holdings import _redelivered

app = Celery("unit", set_as_current=False)
JSON = {"content_type": "application/json", "content_encoding": "utf-8"}


@app.task
def add(*_: object) -> None: ...


def raw(body: bytes, headers: dict[str, Any]) -> Message:
    made: Any = Message
    message: Message = made(body, headers=headers, **JSON)
    return message


def message(body: Any = None, **headers: Any) -> Message:
    text = json.dumps([[], {}, {}] if body is None else body)
    return raw(text.encode(), {"id": "a", "task": "any"} | headers)


def as_celery_sends(signature: Any) -> Message:
    get = signature.options.get
    sent = app.amqp.as_task_v2(
        "a", signature.task, signature.args, signature.kwargs, chord=get("chord"),
        callbacks=get("link"), errbacks=get("link_error"), countdown=5, expires=60, time_limit=3.5,
        stamped_headers=["mine"], mine="x",
    )  # fmt: skip
    return raw(json.dumps(sent.body).encode(), sent.headers)


def test_what_celery_sends_is_believed() -> None:
    linked = add.s(1).set(link=[add.s()], link_error=[add.si(), group(add.s(), add.s())])
    for signature in (linked, add.s().set(chord=chord([add.s()], add.s()))):
        messages.check(app, as_celery_sends(signature), None)
    first = {"task": "any", "id": "a", "args": [1], "kwargs": {}, "retries": 1, "errbacks": None}
    messages.check(app, raw(json.dumps(first).encode(), {}), None)
    messages.check(app, message(expires="2001-01-01T00:00:00", eta="2100-01-01T00:00:00Z"), None)


@pytest.mark.parametrize(
    "headers",
    [
        {"id": None}, {"id": 5}, {"id": ["a"]}, {"id": ""}, {"id": "x" * 256}, {"id": "a\nb"},
        {"task": ["any"]}, {"task": None}, {"root_id": 5}, {"group": {}}, {"shadow": ["x"]},
        {"celeriac_owner": ["ada"]}, {"celeriac_once": 5},
        {"retries": "1"}, {"retries": -1}, {"retries": True}, {"retries": 2**31},
        {"replaced_task_nesting": 0.5}, {"timelimit": "soon"}, {"timelimit": [1]},
        {"timelimit": [1, "x"]}, {"timelimit": [float("nan"), None]},
        {"timelimit": [float("inf"), None]}, {"stamped_headers": [{}]}, {"stamps": ["x"]},
        {"eta": "tomorrow"}, {"eta": 5}, {"eta": ""}, {"eta": "0001-01-01T00:00:00+14:00"},
        {"expires": "never"}, {"expires": [1]},
    ],
)  # fmt: skip
def test_headers_of_other_types_are_refused(headers: dict[str, Any]) -> None:
    with pytest.raises(InvalidTaskError, match=next(iter(headers))):
        messages.check(app, message(**headers), None)


@pytest.mark.parametrize(
    "body",
    [
        5, "text", [], [1, 2], [[], {}], ["text", {}, {}], [[], [], {}], [[], {}, []],
        [[], {}, {"callbacks": "x"}], [[], {}, {"errbacks": [5]}], [[], {}, {"chain": [{}]}],
        [[], {}, {"chord": {"task": 5}}],
    ],
)  # fmt: skip
def test_bodies_of_another_shape_are_refused(body: Any) -> None:
    with pytest.raises(InvalidTaskError):
        messages.check(app, message(body), None)


def test_bodies_that_are_too_large_or_too_deep_are_refused() -> None:
    messages.check(app, message(), 12)
    with pytest.raises(InvalidTaskError, match="limit is 11"):
        messages.check(app, message(), 11)
    with pytest.raises(DecodeError):
        messages.check(app, raw(b"[" * 100_000, {"id": "a"}), None)


@pytest.mark.parametrize("text", [b'{"a":"\xff"}', b"[" * 5000 + b"]" * 5000, b'{"a":"\x01"}'])
def test_what_a_dead_worker_held_is_given_back_even_if_it_cannot_be_read(text: bytes) -> None:
    for to in (b'"ex","key"', b'"", "a\\",\\"b"'):
        assert _redelivered(b"[" + text + b"," + to + b"]") == text
    marked = _redelivered(b'[{"headers":{},"properties":{"delivery_info":{}}},"",""]')
    assert json.loads(marked)["headers"] == {"redelivered": True}
