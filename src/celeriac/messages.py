"""What a worker demands of a message before it believes it.

Celery believes what a message says of itself: a time limit that is a word, or an id that is a list,
is an exception in the worker's main loop, or a place in its pool that is never free again. The
worker ends, the message comes back to the next one, and ends that too.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from celery.exceptions import InvalidTaskError
from celery.utils.time import maybe_iso8601, maybe_make_aware, timezone
from kombu.message import Message

_LONGEST_ID = 255
_MOST = 2**31  # retries
_LATEST = 1e9  # seconds of a time limit

# What is raised on the way by what nobody's Celery has written.
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip

_TEXTS = ("root_id", "parent_id", "group", "shadow", "celeriac_owner", "celeriac_once")
_COUNTS = ("retries", "replaced_task_nesting", "group_index")
_FOLLOWS = ("callbacks", "errbacks", "chain")


_limits: WeakKeyDictionary[Celery, int] = WeakKeyDictionary()


def limit(app: Celery, size: int) -> None:
    """Have `app`'s workers refuse bodies of more than `size` bytes: decoded, they take several
    times their size.
    """
    _limits[app] = size


def limit_of(app: Celery) -> int | None:
    return _limits.get(app)


def check(app: Celery, message: Message, limit: int | None) -> None:
    """Raise InvalidTaskError, or what decoding raises, for what no worker can run.

    A message without a task is left to Celery, which has a word for it.
    """
    if limit is not None and len(message.body or ()) > limit:
        raise InvalidTaskError(f"a body of {len(message.body)} bytes; the limit is {limit}")
    headers, payload = message.headers, message.payload
    if isinstance(payload, dict):  # Celery's first protocol, or a mixture
        headers = payload | headers
        payload = [payload.get("args", ()), payload.get("kwargs", {}), payload]
    if "task" not in headers:
        return
    get = headers.get
    _check_names(headers)
    for name in _COUNTS:
        count = get(name)
        if count is not None and not (type(count) is int and 0 <= count < _MOST):
            raise _refusal(name, count)
    _check_limits(get("timelimit"))
    _check_stamps(headers)
    for name in ("eta", "expires"):
        if get(name) is not None:
            _check_time(app, name, get(name))
    match payload:
        case [list() | tuple(), dict(), dict() | None as follows]:
            if follows:
                _check_follows(follows)
        case _:
            raise InvalidTaskError("the body is no list of arguments, keywords and what follows")


def _refusal(name: str, value: Any) -> InvalidTaskError:
    return InvalidTaskError(f"{name} is {repr(value)[:200]}")


def _check_names(headers: Mapping[str, Any]) -> None:
    task_id, task = headers.get("id"), headers["task"]
    if not is_id(task_id):
        raise _refusal("id", task_id)
    if not isinstance(task, str):
        raise _refusal("task", task)
    for name in _TEXTS:
        value = headers.get(name)
        if value is not None and not isinstance(value, str):
            raise _refusal(name, value)


def is_id(value: object) -> bool:
    """Whether a task may have it: text that can be a key, and be shown."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and value.isprintable()


def _check_limits(limits: Any) -> None:
    if not limits:
        return
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        raise _refusal("timelimit", limits)
    for limit in limits:
        if limit is not None and not (isinstance(limit, (int, float)) and 0 <= limit <= _LATEST):
            raise _refusal("timelimit", limits)


def _check_stamps(headers: Mapping[str, Any]) -> None:
    stamped, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if stamped and not (
        isinstance(stamped, (list, tuple)) and all(isinstance(each, str) for each in stamped)
    ):
        raise _refusal("stamped_headers", stamped)
    if stamps and not isinstance(stamps, dict):
        raise _refusal("stamps", stamps)


def _check_time(app: Celery, name: str, value: Any) -> None:
    if not isinstance(value, (str, datetime)):
        raise _refusal(name, value)
    try:  # as Celery does with it later on
        timezone.to_system(maybe_make_aware(maybe_iso8601(value), app.timezone)).timestamp()
    except MALFORMED as error:
        raise InvalidTaskError(f"{name} is {value!r}: {error}") from error


def _check_follows(follows: Mapping[str, Any]) -> None:
    for name in _FOLLOWS:
        for signature in _list(name, follows.get(name)):
            _check_signature(name, signature)
    chord = follows.get("chord")
    if chord is not None:
        _check_signature("chord", chord)


def _list(name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise _refusal(name, value)
    return value


def _check_signature(name: str, signature: Any) -> None:
    if not isinstance(signature, dict) or not isinstance(signature.get("task"), str):
        raise _refusal(name, signature)
