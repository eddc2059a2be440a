"""Which Redis and which database the children use, and whether what was named answers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from celeriac.embedded import Valkey
from celeriac.errors import ServiceError

BROKER = "CELERY_BROKER_URL"
BACKEND = "CELERY_RESULT_BACKEND"
REDIS = "REDIS_URL"
DATABASE = "DATABASE_URL"

# Others (a database, a file) are no servers that kombu could greet.
_CHECKED_SCHEMES = ("redis", "rediss", "redis+socket", "unix", "amqp", "amqps", "pyamqp")


def shown(url: str) -> str:
    """The URL without its secrets."""
    from kombu.utils.url import maybe_sanitize_url

    try:
        return str(maybe_sanitize_url(url))
    except ValueError:
        return f"{url.partition('://')[0]}://…"


def for_celery(url: str) -> str:
    """redis-py writes unix:///PATH?db=0 where Celery writes redis+socket:///PATH?virtual_host=0."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{quote(unquote(parts.path))}?virtual_host={database}"


def needs_valkey(user: Mapping[str, str]) -> bool:
    return not (user.get(REDIS) or (user.get(BROKER) and user.get(BACKEND)))


def redis_variables(user: Mapping[str, str], valkey: Valkey | None) -> dict[str, str]:
    """The variables about Redis that the user did not set."""
    if valkey is not None:
        given = {REDIS: valkey.redis_url, BROKER: valkey.celery_url, BACKEND: valkey.celery_url}
    elif REDIS in user:
        given = dict.fromkeys((BROKER, BACKEND), for_celery(user[REDIS]))
    else:
        given = {}
    return {name: value for name, value in given.items() if name not in user}


def database_variables(user: Mapping[str, str], folder: Path, data: Path) -> dict[str, str]:
    if DATABASE in user or not (folder / "alembic.ini").exists():
        return {}
    return {DATABASE: f"sqlite:///{data / 'db.sqlite3'}"}


def check_servers(user: Mapping[str, str]) -> None:
    """Connect to every server that the user named. Blocks for seconds where one is silent.

    Raises ServiceError with the reason.
    """
    seen = set()
    for name in (REDIS, BROKER, BACKEND):
        for url in user.get(name, "").split(";"):
            scheme = url.partition(":")[0]
            if url and url not in seen and scheme in _CHECKED_SCHEMES:
                seen.add(url)
                _check_server(name, for_celery(url))


def _check_server(name: str, url: str) -> None:
    from kombu.connection import Connection

    options = {"socket_connect_timeout": 2.0, "socket_timeout": 2.0}
    if url.startswith(("amqp", "pyamqp")):
        options = {}
    try:
        connecting: Any = Connection
        with connecting(url, connect_timeout=2, transport_options=options) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.2, interval_step=0)
    except Exception as error:  # each client library has its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"{name} {shown(url)} does not answer: {reason}; start that server, or unset {name}"
        ) from None


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """Write `export K='v'` lines for another shell; for the user's eyes only."""
    lines = [f"export {name}={_quoted(value)}\n" for name, value in sorted(variables.items())]
    path.unlink(missing_ok=True)  # an old file may have wider rights
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(lines)


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"
