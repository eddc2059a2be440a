"""Redis behind TLS, with users and passwords, as broker, result backend and status store."""

import asyncio
import gc
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from celeriac import PublishError, adelay
from celeriac.status import Reader
from celeriac.store import redis_url
from profiles import Profiled
from support import Process, free_port, missing

PASSWORD = "p@ss/w:rd%"
QUOTED = "p%40ss%2Fw%3Ard%25"


def make_certificate(directory: Path) -> tuple[Path, Path]:
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -keyout {key} -out {certificate} -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(command.split(), check=True, capture_output=True)
    return key, certificate


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Process]]:
    """A Redis, and its URL, that nobody reaches without TLS, a user's name and a password."""
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if server is None or shutil.which("openssl") is None:
        missing("redis-server and openssl")
    directory, port = tmp_path_factory.mktemp("tls"), free_port()
    key, certificate = make_certificate(directory)
    users = directory / "users.acl"
    users.write_text(
        f"user default off\nuser celery on >{PASSWORD} ~* &* +@all -@dangerous +info\n"
    )
    command = f"{server} --port 0 --tls-port {port} --bind 127.0.0.1 --dir {directory}"
    command += f" --tls-cert-file {certificate} --tls-key-file {key} --tls-auth-clients no"
    url = f"rediss://celery:{QUOTED}@localhost:{port}/0"
    url += f"?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificate}"
    with Process([*command.split(), "--aclfile", users]) as process:
        process.wait_for("Ready to accept connections")
        yield url, process


@pytest.fixture
def url(secure: tuple[str, Process]) -> str:
    return secure[0]


@pytest.mark.parametrize("pool", ["prefork", "celeriac"])
def test_publish_run_and_watch_over_tls_as_a_user(url: str, pool: str) -> None:
    own = {"worker_pool": "celeriac.pool:TaskPool"} if pool == "celeriac" else {}
    client = Profiled(url, url, **own)
    note = client.app.signature("profile_app.note", ("one",))

    async def publish_and_watch() -> float:
        result = await adelay(note)
        reader = Reader(client.app)
        try:
            async with asyncio.timeout(30), reader.follow(result.id) as states:
                async for state in states:
                    if state.state == "SUCCESS":
                        return float(state.result)
            raise AssertionError
        finally:
            await reader.aclose()

    with client.worker("-c", "2"):
        assert client.send("note", "one").get(timeout=20)
        assert asyncio.run(publish_and_watch())
        client.send("again", "two", [0.1]).get(timeout=20)
        assert client.control("ping")
    client.close()


def test_a_wrong_password_or_a_strange_certificate_is_an_error_at_once(url: str) -> None:
    for wrong in (url.replace(QUOTED, "mistaken"), url.partition("&ssl_ca_certs")[0]):
        client = Profiled(wrong, url)
        with pytest.raises(RedisError), Redis.from_url(redis_url(wrong)) as direct:
            direct.ping()
        with pytest.raises(PublishError):
            asyncio.run(adelay(client.app.signature("profile_app.note", ("one",))))
        with client.start() as worker:
            assert worker.wait(20) == 1
            assert "does not answer" in worker.output
            assert "Traceback" not in worker.output
            assert "mistaken" not in worker.output
        client.close()


def test_a_server_that_says_no_goodbye_leaves_no_socket_open(secure: tuple[str, Process]) -> None:
    url, server = secure
    client = Profiled(url, url)

    async def publish_and_watch() -> None:
        result = await adelay(client.app.signature("profile_app.note", ("one",)))
        async with Reader(client.app) as reader, reader.follow(result.id) as states:
            await anext(aiter(states))
            server.signal(signal.SIGSTOP)  # TLS says goodbye, and waits for the other's

    try:
        asyncio.run(publish_and_watch())
    finally:
        server.signal(signal.SIGCONT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(each.message) for each in caught] == []
    client.close()
