"""What a worker demands of a message before it believes it.

Celery believes what a message says of itself: a body of another shape, or a time limit that is a
word, is an exception in the consumer's loop. The worker ends, the message comes back to the next
one, and ends that too.
"""

from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from celery.exceptions import InvalidTaskError

_limits: WeakKeyDictionary[Celery, int] = WeakKeyDictionary()

_TEXT = (str, type(None))
_LIST = (list, tuple, type(None))
_OBJECT = (dict, type(None))
_HEADERS: dict[str, Any] = {
    "root_id": _TEXT,
    "parent_id": _TEXT,
    "group": _TEXT,
    "shadow": _TEXT,
    "retries": (int, type(None)),
    "timelimit": _LIST,
    "stamps": _OBJECT,
    "stamped_headers": _LIST,
    "replaced_task_nesting": (int, type(None)),
}
_EMBEDDED: dict[str, Any] = {
    "callbacks": _LIST,
    "errbacks": _LIST,
    "chain": _LIST,
    "chord": _OBJECT,
}


def limit(app: Celery, size: int) -> None:
    """Have `app`'s workers refuse bodies of more than `size` bytes: decoded, they take several
    times their size.
    """
    _limits[app] = size


def limit_of(app: Celery) -> int | None:
    return _limits.get(app)


def check(message: Any, limit: int | None) -> None:
    """Raises InvalidTaskError, or what the deserializer raises."""
    if limit is not None and len(message.body or ()) > limit:
        raise InvalidTaskError(f"a body of {len(message.body)} bytes; the limit is {limit}")
    headers, payload = message.headers, message.payload
    if isinstance(payload, dict):  # the first protocol, or a mixture
        headers = payload | (headers or {})
        payload = [payload.get("args", ()), payload.get("kwargs", {}), payload]
    for name in ("id", "task"):
        if not isinstance(headers.get(name), str):
            raise InvalidTaskError(f"{name} is {headers.get(name)!r}")
    _check_types(headers, _HEADERS)
    limits = headers.get("timelimit")
    if limits and not (len(limits) == 2 and all(_is_number(each) for each in limits)):
        raise InvalidTaskError(f"timelimit is {limits!r}")
    match payload:
        case [list() | tuple(), dict(), dict() | None as embedded]:
            _check_types(embedded or {}, _EMBEDDED)
        case _:
            raise InvalidTaskError("the body is no list of arguments, keywords and what follows")


def _check_types(values: dict[str, Any], types: dict[str, Any]) -> None:
    for name, expected in types.items():
        if not isinstance(values.get(name), expected):
            raise InvalidTaskError(f"{name} is {values[name]!r}")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))
