"""Redis and the database: the user's own, checked before anything starts, or ours."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from celeriac.cli.dev.supervisor import FIRST_DELAY, LONGEST_DELAY, Supervisor, describe_end
from celeriac.embedded import Valkey
from celeriac.errors import CeleriacError, ServiceError

BROKER = "CELERY_BROKER_URL"
BACKEND = "CELERY_RESULT_BACKEND"
REDIS = "REDIS_URL"
DATABASE = "DATABASE_URL"
HEALTH = "CELERIAC_HEALTH_DIR"

# Others (a database, a file) are no servers that kombu could greet.
_CHECKED_SCHEMES = ("redis", "rediss", "redis+socket", "unix", "amqp", "amqps", "pyamqp")


def shown(url: str) -> str:
    """The URL without its secrets."""
    from kombu.utils.url import maybe_sanitize_url

    try:
        return str(maybe_sanitize_url(url))
    except ValueError:
        return f"{url.partition('://')[0]}://…"


def _for_celery(url: str) -> str:
    """redis-py writes unix:///PATH?db=0 where Celery writes redis+socket:///PATH?virtual_host=0."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{quote(unquote(parts.path))}?virtual_host={database}"


def needs_valkey(user: Mapping[str, str]) -> bool:
    return not (user.get(REDIS) or (user.get(BROKER) and user.get(BACKEND)))


def variables(user: Mapping[str, str], valkey: Valkey | None, data: Path) -> dict[str, str]:
    """What every process is told beside what the user set."""
    # Of its own: another project's worker that is ill shall not be taken for this one's.
    given = {HEALTH: str(data.resolve() / "health")}
    if valkey is not None:
        given |= {REDIS: valkey.redis_url, BROKER: valkey.celery_url, BACKEND: valkey.celery_url}
    elif REDIS in user:
        given |= dict.fromkeys((BROKER, BACKEND), _for_celery(user[REDIS]))
    if Path("alembic.ini").exists():
        given[DATABASE] = f"sqlite:///{data / 'db.sqlite3'}"
    return given


def check(user: Mapping[str, str]) -> None:
    """Connect to every server that the user named. Blocks for seconds where one is silent.

    Raises ServiceError with the reason.
    """
    seen = set()
    for name in (REDIS, BROKER, BACKEND):
        for url in user.get(name, "").split(";"):
            if url not in seen and url.partition(":")[0] in _CHECKED_SCHEMES:
                seen.add(url)
                _check_one(name, _for_celery(url))


def _check_one(name: str, url: str) -> None:
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


class KeptValkey:
    """A Valkey that lives as long as the runner: started again when it dies, stopped last."""

    def __init__(self, data: Path, supervisor: Supervisor) -> None:
        self.server = Valkey(data)
        self.state = "starting"
        self._console = supervisor.console
        self._watchdog = supervisor.watchdog
        self._group = 0
        # One thread that stays: the kernel ends the server when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "valkey")
        self._watchdog.remember(self.server.socket.parent)

    async def _in_thread(self, work: Callable[..., None], *args: float) -> None:
        # Shielded: a start that goes on unseen would leave a server behind.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work, *args))

    async def start(self) -> None:
        """Start it and wait until it answers. Raises ServiceError or RedisNotFoundError."""
        await self._in_thread(self.server.start)
        assert self.server.process is not None
        self._group = self.server.process.pid
        self._watchdog.add(self._group, "server")
        self.state = "ready"

    async def keep(self) -> None:
        """Start it again, on the same socket, whenever it dies."""
        delay = FIRST_DELAY
        while True:
            process = self.server.process
            if process is not None and process.poll() is None:
                await asyncio.sleep(0.1)
                continue
            reason = describe_end(process.returncode) if process is not None else self.state
            self._console.say(f"redis ended ({reason}); starting it again")
            self._watchdog.remove(self._group)
            try:
                await self._in_thread(self.server.stop)
                await self.start()
                self._console.say("redis is back")
                delay = FIRST_DELAY
            except (CeleriacError, OSError) as error:
                self.state = f"failed: {error}"
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_DELAY)

    async def close(self) -> None:
        """Stop it and remove its socket. Its data stays."""
        if (process := self.server.process) is not None:
            process.terminate()  # from here: its thread may be waiting for a start
        await self._in_thread(self.server.stop, 0.6)
        await self._in_thread(self.server.close)
        self._watchdog.remove(self._group)
        self._thread.shutdown()
