"""The app that is examined, and what the checks say of it."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from celeriac.profile import AMQP_SCHEMES, REDIS_SCHEMES
from celeriac.settings import Settings, mask
from celeriac.store import redis_url

TIMEOUT = 2.0  # seconds for each answer
_LIMITS: dict[str, Any] = {
    "socket_timeout": TIMEOUT,
    "socket_connect_timeout": TIMEOUT,
    "retry": Retry(NoBackoff(), 0),
}


class Severity(StrEnum):
    ERROR = "error"  # tasks are lost, run twice or wait for ever, or strangers get in
    WARNING = "warning"  # so they are when something else goes wrong
    NOTE = "note"  # what could not be looked at, or is to be known


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    check: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Server:
    """A service that the app uses, and for what."""

    url: str
    roles: frozenset[str]  # of broker, result backend, status store

    @property
    def shown(self) -> str:
        return mask("url", self.url)

    @property
    def name(self) -> str:
        return f"the {' and '.join(sorted(self.roles))} {self.shown}"


class Patient:
    """An app, its settings if it has any, and connections that are closed at the end."""

    def __init__(self, app: Celery, settings: Settings | None, flower_url: str | None) -> None:
        self.app, self.settings = app, settings
        self.flower_url = flower_url or getattr(settings, "flower_url", None)
        self._stack = ExitStack()
        self._clients: dict[str, redis.Redis | Exception] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def conf(self) -> Any:
        return self.app.conf

    @property
    def tasks(self) -> list[Any]:
        """Its own, without Celery's."""
        found = self.app.tasks.items()
        return [task for name, task in sorted(found) if not name.startswith("celery.")]

    @property
    def broker_url(self) -> str:
        """The first, of several brokers; of several Sentinels, which know of one, all."""
        given: str | list[str] = self.conf.broker_write_url or "amqp://"
        url = given if isinstance(given, str) else ";".join(given)
        return url if url.startswith("sentinel:") else url.split(";")[0]

    @property
    def result_url(self) -> str:
        backend = self.app.backend_cls or self.conf.result_backend
        return backend if isinstance(backend, str) else ""

    @property
    def on_redis(self) -> bool:
        return urlsplit(self.broker_url).scheme in REDIS_SCHEMES

    @property
    def on_rabbitmq(self) -> bool:
        return urlsplit(self.broker_url).scheme in AMQP_SCHEMES

    @cached_property
    def servers(self) -> list[Server]:
        """Each once, with all of its roles."""
        status = getattr(self.settings, "ws_message_queue", None)
        roles: dict[str, set[str]] = {}
        for role, url in (
            ("broker", self.broker_url),
            ("result backend", self.result_url),
            ("status store", status),
        ):
            if url and "://" in url:
                roles.setdefault(url, set()).add(role)
        return [Server(url, frozenset(found)) for url, found in roles.items()]

    def redis_servers(self) -> list[Server]:
        return [each for each in self.servers if urlsplit(each.url).scheme in REDIS_SCHEMES]

    def client_of(self, server: Server) -> redis.Redis | Exception:
        """A client of a server that has answered, or why it did not."""
        if server.url not in self._clients:
            self._clients[server.url] = self._connect(server)
        return self._clients[server.url]

    def _connect(self, server: Server) -> redis.Redis | Exception:
        try:
            if server.url.startswith("sentinel:"):
                client = self._behind_sentinels(server)
            else:
                client = redis.Redis.from_url(redis_url(server.url), **_LIMITS)
            self._stack.callback(client.close)
            client.ping()
        except (RedisError, OSError, ValueError) as error:
            return error
        return client

    def _behind_sentinels(self, server: Server) -> redis.Redis:
        of_broker = "broker" in server.roles
        name = "broker_transport_options" if of_broker else "result_backend_transport_options"
        options = self.conf.get(name) or {}
        parts = [urlsplit(url) for url in server.url.split(";")]
        addresses = [(each.hostname or "localhost", each.port or 26379) for each in parts]
        known = _LIMITS | dict(options.get("sentinel_kwargs") or {})
        sentinels: Any = Sentinel(addresses, sentinel_kwargs=known)  # type: ignore[no-untyped-call]
        user, password = parts[0].username, parts[0].password
        found: redis.Redis = sentinels.master_for(
            options.get("master_name") or "", db=int(parts[0].path.strip("/") or 0),
            username=unquote(user) if user else None,
            password=unquote(password) if password else None, **_LIMITS,
        )  # fmt: skip
        return found

    def answering(self) -> list[tuple[Server, redis.Redis]]:
        found = [(server, self.client_of(server)) for server in self.redis_servers()]
        return [(server, each) for server, each in found if isinstance(each, redis.Redis)]

    @cached_property
    def rabbitmq(self) -> Any:
        """A connection to RabbitMQ, or why there is none."""
        connection = self.app.connection_for_write(connect_timeout=TIMEOUT)
        options = dict(connection.transport_options or {})
        connection.transport_options = options | {"read_timeout": TIMEOUT, "write_timeout": TIMEOUT}
        self._stack.callback(_release, connection)
        try:
            connection.connect()
        except Exception as error:  # whatever a broker's library raises
            return error
        return connection

    @cached_property
    def broker_answers(self) -> bool:
        if self.on_rabbitmq:
            return not isinstance(self.rabbitmq, Exception)
        servers = [each for each in self.redis_servers() if "broker" in each.roles]
        return all(isinstance(self.client_of(each), redis.Redis) for each in servers)

    @cached_property
    def consumed(self) -> dict[str, set[str]] | None:
        """The queues of each worker that answers; None without a broker."""
        if not self.broker_answers:
            return None
        with self.app.connection_for_write() as connection:
            inspect = self.app.control.inspect(timeout=TIMEOUT, connection=connection)
            answers = inspect.active_queues() or {}
        return {node: {each["name"] for each in queues} for node, queues in answers.items()}


def _release(connection: Any) -> None:
    with suppress(Exception):
        connection.release()
