"""Where the status of tasks is kept in Redis, and under which keys."""

import logging
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakKeyDictionary

import redis
import redis.asyncio
from celery import Celery
from celery.backends.redis import RedisBackend, SentinelBackend
from redis.asyncio.connection import AbstractConnection

from celeriac.errors import ConfigurationError

logger = logging.getLogger(__name__)

# An app's own status store where it is another Redis than its result backend.
_urls: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()

_LONGEST_WAIT = 2.0  # seconds

_REDIS_SCHEMES = {"redis", "rediss", "redis+socket", "unix"}
ASYNC_CONNECTIONS = {
    redis.Connection: redis.asyncio.Connection,
    redis.SSLConnection: redis.asyncio.SSLConnection,
    redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
}


def redis_url(url: str) -> str:
    """A Redis address as Celery writes it, as redis-py writes it."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "redis+socket":
        database = query.pop("virtual_host", "0")
        return f"unix://{parts.netloc}{parts.path}?{urlencode({'db': database, **query})}"
    if "ssl_cert_reqs" in query:  # Celery takes the names of the ssl module, redis-py its own
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].removeprefix("CERT_").lower()
        return urlunsplit(parts._replace(query=urlencode(query)))
    return url


def keep_status_in(app: Celery, url: str) -> None:
    """Keep the status of `app`'s tasks in the Redis at `url` too, for those who watch.

    Raises ConfigurationError for a URL that is no Redis's. Where it is the result backend's own,
    or that is no Redis and could not write there, the result backend alone serves.
    """
    if urlsplit(url).scheme not in _REDIS_SCHEMES:
        raise ConfigurationError(
            "WS_MESSAGE_QUEUE is no URL of a Redis: expected redis://, rediss:// or unix://"
        )
    backend = app.backend_cls or app.conf.result_backend
    if isinstance(backend, str) and urlsplit(backend).scheme in _REDIS_SCHEMES:
        if redis_url(backend) != redis_url(url):
            _urls[app] = url
    else:
        logger.warning("WS_MESSAGE_QUEUE is not used: the result backend is no Redis")


def status_client(app: Celery) -> redis.Redis | None:
    """A client of `app`'s own status store; None where its result backend serves."""
    url = _urls.get(app)
    if url is None:
        return None
    return redis.Redis.from_url(
        redis_url(url), socket_timeout=_LONGEST_WAIT, socket_connect_timeout=_LONGEST_WAIT
    )


def bounded_client(app: Celery) -> redis.Redis:
    """A client of `app`'s status store, which is a Redis, that waits for nothing for long."""
    own = status_client(app)
    if own is not None:
        return own
    backend = app.backend
    given = {name: value for name, value in backend.connparams.items() if value is not None}
    unix = given.get("connection_class") is redis.UnixDomainSocketConnection
    names = ("socket_timeout",) if unix else ("socket_timeout", "socket_connect_timeout")
    limits = {name: min(given.get(name) or _LONGEST_WAIT, _LONGEST_WAIT) for name in names}
    client: redis.Redis = backend._create_client(**given | limits)
    return client


def is_broker(app: Celery) -> bool:
    """Whether `app`'s status store is seen to be its broker's server and database."""
    broker = app.conf.broker_write_url or app.conf.broker_url
    status = _urls.get(app) or getattr(app.backend, "url", None)
    if not isinstance(broker, str) or not isinstance(status, str):
        return False
    if status.startswith("socket:"):  # what Celery's backend makes of redis+socket
        status = f"redis+{status}"
    if {urlsplit(url).scheme for url in (broker, status)} - _REDIS_SCHEMES:
        return False
    return _place_of(broker) == _place_of(status)


def _place_of(url: str) -> tuple[Any, ...]:
    try:
        found: dict[str, Any] = redis.connection.parse_url(redis_url(url))  # type: ignore[no-untyped-call]
    except ValueError:
        return (url,)
    address = found.get("path") or (found.get("host", "localhost"), found.get("port", 6379))
    return address, found.get("db", 0)


def status_connection(app: Celery) -> AbstractConnection | None:
    """A new connection to where `app`'s status is kept, not yet open; None if that is no Redis.

    It waits for ever: the caller sets the limits.
    """
    options: dict[str, Any]
    if (url := _urls.get(app)) is not None:
        pool = redis.asyncio.ConnectionPool.from_url(redis_url(url))
        kind, options = pool.connection_class, dict(pool.connection_kwargs)
    elif isinstance(app.backend, RedisBackend) and not isinstance(app.backend, SentinelBackend):
        kind, options = _connection_of(app.backend)
    else:
        return None
    # RESP3: replies and messages come over one connection, in the order in which they were made.
    return async_connection(kind, options | {"protocol": 3})


def result_connection(backend: RedisBackend) -> AbstractConnection:
    """A new connection to the result backend's Redis, not yet open, on which no pushes come."""
    kind, options = _connection_of(backend)
    return async_connection(kind, options | {"protocol": 2, "health_check_interval": 0})


def _connection_of(backend: RedisBackend) -> tuple[type[AbstractConnection], dict[str, Any]]:
    options = dict(backend.connparams)
    options.pop("max_connections", None)
    return ASYNC_CONNECTIONS[options.pop("connection_class", redis.Connection)], options


def async_connection(kind: type[AbstractConnection], options: dict[str, Any]) -> AbstractConnection:
    """A new connection, not yet open, that waits for ever: the caller sets the limits."""
    options = options | {"decode_responses": False}
    # redis-py keeps these with asyncio.wait_for, which loses a cancellation before Python 3.12.
    options |= {"socket_timeout": None, "socket_connect_timeout": None}
    return kind(**options)


def task_key(app: Celery, task_id: str) -> bytes:
    """The key, and channel, of a task's state: Celery's own, `global_keyprefix` honoured."""
    key: bytes = app.backend.get_key_for_task(task_id)
    return key
