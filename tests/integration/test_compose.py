"""The Compose file, and the scripts of its image against real services. No Docker is needed."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import pytest
from celery import Celery
from celery.result import AsyncResult
from redis import Redis
from ruamel.yaml import YAML

from celeriac.embedded import Valkey
from celeriac.store import redis_url as to_redis_py

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "reference"
COMPOSE_FILE = REFERENCE / "docker-compose.yml"
SCRIPTS = REFERENCE / "compose"
ENTRYPOINT = SCRIPTS / "entrypoint"
STARTS = ["start", "start-celeryworker", "start-celerybeat", "start-flower"]

USER = "celeriac"
PASSWORD = "p@ss%word"
QUOTED_PASSWORD = "p%40ss%25word"

WAITING = "Waiting for PostgreSQL to become available…"
AVAILABLE = "PostgreSQL is available"

# What a developer's shell may hold, and what must not decide how a test ends.
INHERITED = re.compile(
    r"(CELERY|FLOWER|PG)\w*|(REDIS|DATABASE)_\w+|FASTAPI_CONFIG|WS_MESSAGE_QUEUE|MAILING_LIST_URL"
    r"|POSTGRES_WAIT|BEAT_SCHEDULE_FILE|RELOAD|PORT|TEST_\w+"
)


def missing(reason: str) -> NoReturn:
    """A missing service is a skip at home and a failure in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not INHERITED.fullmatch(name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return clean | {"PATH": path, "PYTHONUNBUFFERED": "1"} | more


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


class Script:
    """A running script; its output goes to files. Whatever it leaves behind is killed."""

    def __init__(
        self, *command: str | Path, folder: Path, env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self._files = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2)]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=cwd or folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def wait_for(self, text: str, count: int = 1, timeout: float = 20.0) -> None:
        def said() -> bool:
            if self.output.count(text) >= count:
                return True
            assert self.process.poll() is None, f"ended without {text!r}:\n{self.output}"
            return False

        eventually(said, f"{text!r} {count} times", timeout)

    def wait(self, timeout: float = 20.0) -> int:
        return self.process.wait(timeout)

    def stop(self, timeout: float = 20.0) -> int:
        self.process.terminate()
        return self.wait(timeout)

    def left_behind(self) -> bool:
        """Whether a process of its session lives. A zombie does not: who reaps it, is not ours."""
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                ours = os.getsid(process.pid) == self.process.pid
                if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def __enter__(self) -> "Script":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if self.left_behind():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if error is not None:
            print(self.output)


# --- PostgreSQL of our own ---------------------------------------------------------------------


def postgres_programs() -> Path:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(versions, key=lambda path: float(path.parts[-3]), default=None)
    if newest is None:
        missing("PostgreSQL's server programs are not installed")
    return newest.parent


class Cluster:
    """A PostgreSQL server that asks for passwords, on a port of its own. Made stopped."""

    def __init__(self, folder: Path) -> None:
        self._programs = postgres_programs()
        self._folder = folder
        self._data = folder / "data"
        self.port = free_port()
        # PostgreSQL refuses to run as root.
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            try:
                shutil.chown(folder, "postgres", "postgres")
            except LookupError:
                missing("there is no user postgres to run PostgreSQL as")
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        self._run(
            *("initdb", "--auth=scram-sha-256", f"--username={USER}", f"--pwfile={password_file}"),
            *("--no-sync", "--no-locale", "--encoding=UTF8", f"--pgdata={self._data}"),
        )

    def _run(self, program: str, *arguments: str) -> None:
        result = subprocess.run(
            [self._programs / program, *arguments],
            cwd=self._folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            # Not a pipe: the server inherits it, and the reader would wait for the server's end.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            **self._as_user,
        )
        log = self._folder / "log"
        assert result.returncode == 0, log.read_text() if log.exists() else program

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "--wait", f"--pgdata={self._data}", *arguments)

    @property
    def running(self) -> bool:
        return (self._data / "postmaster.pid").exists()

    def start(self) -> None:
        if not self.running:
            options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
            self._control(f"--log={self._folder / 'log'}", f"--options={options}", "start")

    def stop(self) -> None:
        if self.running:
            self._control("--mode=immediate", "stop")

    def url(self, *, password: str = QUOTED_PASSWORD, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        options: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "dbname": database}
        with (
            psycopg.connect(user=USER, password=PASSWORD, autocommit=True, **options) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not in tmp_path: its parents are closed to the user postgres, and sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="celeriac-pg-"))
    try:
        made = Cluster(folder)
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres(cluster: Cluster) -> Cluster:
    cluster.start()
    return cluster


@pytest.fixture
def stopped_postgres(cluster: Cluster) -> Cluster:
    cluster.stop()
    return cluster


@pytest.fixture
def database(postgres: Cluster) -> Iterator[str]:
    """The name of an empty database."""
    name = f"reference_{uuid.uuid4().hex[:8]}"
    postgres.execute(f"CREATE DATABASE {name}")
    yield name
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


# --- Redis -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        yield given
        return
    with Valkey(tmp_path_factory.mktemp("valkey")) as valkey:
        yield valkey.celery_url


# --- the Compose file --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(COMPOSE_FILE)
    return loaded


def dockerfile_steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = (SCRIPTS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def test_docker_waits_for_what_a_worker_lets_run_and_gives_back(compose: dict[str, Any]) -> None:
    worker = compose["services"]["celery_worker"]
    assert worker["stop_grace_period"] == "2m"
    assert 60 < float(worker["environment"]["CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT"]) < 120 - 2


def test_compose_file_is_valid() -> None:
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    checked = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_six_services_and_their_ports(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {"redis", "db", "web", "celery_worker", "celery_beat", "flower"} <= services.keys()
    assert services["web"]["ports"] == ["8010:8010"]
    assert services["flower"]["ports"] == ["127.0.0.1:5557:5555"]


def test_one_image_built_once(compose: dict[str, Any]) -> None:
    services = compose["services"]
    ours = ["web", "celery_worker", "celery_beat", "flower", "mailing_list"]
    assert {services[name]["image"] for name in ours} == {"celeriac-reference"}
    built = [name for name, service in services.items() if "build" in service]
    assert built == ["web"]
    context = (REFERENCE / services["web"]["build"]["context"]).resolve()
    assert context == ROOT
    assert context / services["web"]["build"]["dockerfile"] == SCRIPTS / "Dockerfile"
    # Started alone, a service brings the one along that builds its image.
    assert all("web" in services[name]["depends_on"] for name in ours if name != "web")


def test_everything_depended_on_exists_and_can_be_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[name], name
            else:
                assert name in services


@pytest.mark.parametrize(
    ("service", "role"), [("web", "web"), ("celery_worker", "worker"), ("celery_beat", "beat")]
)
def test_each_of_ours_is_probed(service: str, role: str, compose: dict[str, Any]) -> None:
    """By a command that exists: with nothing to probe it says so, in one line."""
    test = compose["services"][service]["healthcheck"]["test"]
    assert test.startswith(f"celeriac health {role} --ready")
    unused = tempfile.mkdtemp()
    url = f"--url=http://127.0.0.1:{free_port()}/"
    done = subprocess.run(
        [*shlex.split(test), url],
        env=environment(CELERIAC_HEALTH_DIR=unused), capture_output=True, text=True,
    )  # fmt: skip
    os.rmdir(unused)  # noqa: PTH106
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 1, "")


def test_urls_name_services_of_the_file(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in ["web", "celery_worker", "celery_beat", "flower"]:
        given = services[name]["environment"]
        assert given["DATABASE_URL"].split("@")[1].split("/")[0] == "db"
        for url in ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "WS_MESSAGE_QUEUE"]:
            assert given[url] == "redis://redis:6379/0"
        assert given["MAILING_LIST_URL"] == "http://mailing_list:9010"
        assert given["FASTAPI_CONFIG"] == "development"


def test_image_holds_every_script_that_is_started(compose: dict[str, Any]) -> None:
    steps = dockerfile_steps()
    in_image = {f"/{path.name}" for path in SCRIPTS.iterdir()} & {
        f"/{Path(source).name}"
        for name, rest in steps
        if name == "COPY" and rest.split()[-1] == "/"
        for source in rest.split()[:-1]
    }
    assert in_image == {"/entrypoint", *(f"/{name}" for name in STARTS)}

    started = [service.get("command", "") for service in compose["services"].values()]
    scripts = {command for command in started if command.startswith("/")}
    assert scripts == {f"/{name}" for name in STARTS}
    assert scripts <= in_image
    assert ("ENTRYPOINT", '["/entrypoint"]') in steps
    assert ("WORKDIR", "/app") in steps


def test_image_does_not_run_as_root() -> None:
    users = [rest for name, rest in dockerfile_steps() if name == "USER"]
    assert users
    assert users[-1] not in {"root", "0"}


def test_everything_copied_passes_the_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    for name, rest in dockerfile_steps():
        if name == "COPY":
            for source in [word for word in rest.split()[:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists(), source
                assert Path(source).parts[0] in allowed, source


# --- the line ends -----------------------------------------------------------------------------


def run_mending_step(folder: Path) -> None:
    """Run the Dockerfile's own sed on the scripts in `folder`."""
    step = next(rest for name, rest in dockerfile_steps() if name == "RUN" and "sed" in rest)
    for command in step.split("&&"):
        words = [
            f"{folder}{word}" if word.startswith("/") else word for word in shlex.split(command)
        ]
        subprocess.run(words, check=True)


def test_scripts_survive_crlf(tmp_path: Path) -> None:
    for name in ["entrypoint", *STARTS]:
        text = (SCRIPTS / name).read_bytes()
        assert b"\r" not in text
        (tmp_path / name).write_bytes(text.replace(b"\n", b"\r\n"))
        (tmp_path / name).chmod(0o755)

    def works(name: str, *arguments: str) -> bool:
        command = ["bash", *arguments, str(tmp_path / name), "true"]
        done = subprocess.run(command, env=environment(), capture_output=True, timeout=10)
        return done.returncode == 0

    assert not works("entrypoint")
    run_mending_step(tmp_path)
    assert works("entrypoint")
    for name in ["entrypoint", *STARTS]:
        assert works(name, "-n")
        assert (tmp_path / name).read_bytes() == (SCRIPTS / name).read_bytes()
        assert os.access(tmp_path / name, os.X_OK)


@pytest.mark.parametrize("name", ["entrypoint", *STARTS])
def test_scripts_are_strict(name: str) -> None:
    lines = (SCRIPTS / name).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "set -o errexit -o pipefail -o nounset" in lines


# --- the entrypoint ----------------------------------------------------------------------------


def enter(url: str | None, *command: str, wait: float = 5, timeout: float = 20) -> Any:
    """Run the entrypoint to its end; its `seconds` beside what `subprocess.run` tells."""
    given = {} if url is None else {"DATABASE_URL": url}
    started = time.monotonic()
    done: Any = subprocess.run(
        ["bash", ENTRYPOINT, *(command or ("echo", "the command ran"))],
        env=environment(POSTGRES_WAIT=str(wait), **given),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    done.seconds = time.monotonic() - started
    return done


def refused_at_once(done: Any, reason: str) -> None:
    assert done.returncode != 0
    assert done.seconds < 10
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert AVAILABLE not in done.stderr.splitlines()
    assert done.stdout == ""


@pytest.mark.parametrize("url", [None, "", "sqlite:///db.sqlite3"])
def test_other_databases_are_not_waited_for(url: str | None) -> None:
    done = enter(url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the command ran\n", "")


def test_waits_for_a_late_database(stopped_postgres: Cluster, tmp_path: Path) -> None:
    env = environment(DATABASE_URL=stopped_postgres.url())
    command = ("bash", ENTRYPOINT, "echo", "the command ran")
    with Script(*command, folder=tmp_path, env=env) as script:
        script.wait_for(WAITING)
        assert script.stdout == ""
        stopped_postgres.start()
        assert script.wait() == 0
        assert script.stderr.splitlines() == [WAITING, AVAILABLE]
        assert script.stdout == "the command ran\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("postgresql+psycopg:", "postgresql:"),
        ("postgresql+psycopg:", "postgres:"),
        ("postgresql+psycopg:", "postgresql+psycopg2:"),
        ("postgresql+psycopg:", "postgresql+asyncpg:"),
        ("/postgres", "/postgres?connect_timeout=1&application_name=web"),
    ],
)
def test_every_form_of_url(postgres: Cluster, old: str, new: str) -> None:
    done = enter(postgres.url().replace(old, new, 1) if old else postgres.url())
    assert done.stderr.splitlines() == [AVAILABLE]
    assert (done.returncode, done.stdout) == (0, "the command ran\n")


def test_asyncpg_options_are_not_handed_to_libpq(postgres: Cluster) -> None:
    url = postgres.url().replace("+psycopg", "+asyncpg") + "?ssl=prefer"
    assert enter(url).stderr.splitlines() == [AVAILABLE]


@pytest.mark.parametrize("password", ["wrong", QUOTED_PASSWORD.replace("%40", "%2540")])
def test_wrong_password_ends_at_once(postgres: Cluster, password: str) -> None:
    done = enter(postgres.url(password=password), wait=60)
    refused_at_once(done, f'FATAL:  password authentication failed for user "{USER}"')
    assert WAITING not in done.stderr


def test_missing_password_ends_at_once(postgres: Cluster) -> None:
    url = postgres.url().replace(f":{QUOTED_PASSWORD}@", "@")
    refused_at_once(enter(url, wait=60), "no password supplied")


def test_unknown_database_ends_at_once(postgres: Cluster) -> None:
    done = enter(postgres.url(database="nowhere"), wait=60)
    refused_at_once(done, 'FATAL:  database "nowhere" does not exist')


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql//127.0.0.1", "Could not parse SQLAlchemy URL"),
        ("postgresql://u:secret@127.0.0.1:port/x", "the port is not a number"),
        ("postgresql://u:se@cret:x@127.0.0.1/x", "the port is not a number"),
        ("postgresql://u:secret@127.0.0.1:1/x?sslmode=nonsense", 'sslmode value: "nonsense"'),
        ("postgresql://u:secret@127.0.0.1:1/x?nonsense=1", "nonsense"),
    ],
)
def test_bad_url_ends_at_once(url: str, reason: str) -> None:
    done = enter(url, wait=60)
    refused_at_once(done, reason)
    assert "cret" not in done.stderr


def test_bad_wait_ends_at_once() -> None:
    given = environment(DATABASE_URL="postgresql://127.0.0.1:1/x", POSTGRES_WAIT="soon")
    done = subprocess.run(
        ["bash", ENTRYPOINT, "true"], env=given, capture_output=True, text=True, timeout=10
    )
    assert done.returncode != 0
    assert "POSTGRES_WAIT: expected seconds" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Connection refused"), ("db.invalid", "db.invalid")]
)
def test_gives_up_on_a_database_that_never_comes(host: str, reason: str) -> None:
    done = enter(f"postgresql://u:secret@{host}:{free_port()}/x", wait=1.5)
    assert done.returncode != 0
    assert 1.5 <= done.seconds < 10
    assert done.stderr.splitlines()[0] == WAITING
    assert done.stderr.count(WAITING) == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert done.stdout == ""


def test_gives_up_on_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        done = enter(f"postgresql://u:secret@127.0.0.1:{port}/x", wait=1)
    assert done.returncode != 0
    assert done.seconds < 10
    assert "timeout" in done.stderr
    assert "Traceback" not in done.stderr


def answer_that_it_is_starting_up(server: socket.socket) -> None:
    """Speak as much PostgreSQL as a server that is not ready."""
    fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # closed: the test is over
        with connection:
            # SSLRequest and GSSENCRequest are 8 bytes long; the answer N means "in the clear".
            while len(connection.recv(1024)) == 8:
                connection.sendall(b"N")
            connection.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)


def test_waits_for_a_database_that_is_starting_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_that_it_is_starting_up, args=[server])
        thread.start()
        try:
            url = f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/x"
            done = enter(url, wait=1.5)
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends accept
            thread.join(5)
    assert done.stderr.splitlines()[0] == WAITING
    assert done.seconds >= 1.5
    assert "the database system is starting up" in done.stderr


CHILD = """
import signal, sys
def end(*_):
    print("told to end", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("with_database", [False, True])
def test_sigterm_reaches_the_command(
    with_database: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    env = environment()
    if with_database:
        env["DATABASE_URL"] = request.getfixturevalue("postgres").url()
    command = ("bash", ENTRYPOINT, sys.executable, "-c", CHILD)
    with Script(*command, folder=tmp_path, env=env) as script:
        script.wait_for("ready")
        assert script.stop() == 7
        assert "told to end" in script.stdout


def test_sigterm_ends_the_wait(tmp_path: Path) -> None:
    env = environment(DATABASE_URL=f"postgresql://u@127.0.0.1:{free_port()}/x")
    with Script("bash", ENTRYPOINT, "true", folder=tmp_path, env=env) as script:
        script.wait_for(WAITING)
        started = time.monotonic()
        assert script.stop() == 143
        assert time.monotonic() - started < 5
        eventually(lambda: not script.left_behind(), "its Python has ended", 2)
        assert "Traceback" not in script.stderr


# --- the start scripts, what they start --------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A folder with an `alembic`, `uvicorn` and `celery` that only say how they were started."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    for name in ["alembic", "uvicorn", "celery"]:
        (folder / name).write_text('#!/bin/bash\necho "$$ ${0##*/} $*"\nexit "${CODE:-0}"\n')
        (folder / name).chmod(0o755)
    return folder


def started_by(name: str, folder: Path, **more: str) -> tuple[int, list[str]]:
    """The exit code and the recorded starts; the last one's pid must be the script's own."""
    env = environment(**more)
    env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    with Script("bash", SCRIPTS / name, folder=folder, env=env) as script:
        code = script.wait()
        starts = [line.partition(" ") for line in script.stdout.splitlines()]
        if code == 0:
            assert starts[-1][0] == str(script.process.pid)
        return code, [command for _, _, command in starts]


def test_start_migrates_then_serves(recorded: Path) -> None:
    code, (migration, server) = started_by("start", recorded)
    assert code == 0
    assert migration == "alembic upgrade head"
    assert server.startswith("uvicorn main:app --host 0.0.0.0 --port 8010")
    assert "--reload" not in server

    _, (_, server) = started_by("start", recorded, PORT="8123", RELOAD="true")
    assert "--port 8123" in server
    assert "--reload --reload-dir ." in server


def test_start_serves_nothing_after_a_failed_migration(recorded: Path) -> None:
    code, starts = started_by("start", recorded, CODE="3")
    assert (code, starts) == (3, ["alembic upgrade head"])


def test_worker_beat_and_flower_become_celery(recorded: Path) -> None:
    _, starts = started_by("start-celeryworker", recorded)
    assert starts == ["celery -A main.celery worker --loglevel=info"]

    _, (beat,) = started_by("start-celerybeat", recorded, BEAT_SCHEDULE_FILE="/some/where")
    assert beat.startswith("celery -A main.celery beat --loglevel=info")
    assert "--schedule=/some/where" in beat
    assert "--pidfile= " in f"{beat} "

    _, (flower,) = started_by("start-flower", recorded)
    assert flower == "celery -A main.celery flower --port=5555"
    _, (flower,) = started_by("start-flower", recorded, FLOWER_PORT="5666")
    assert flower == "celery -A main.celery flower --port=5666"


# --- the start scripts with a small application ------------------------------------------------

APPLICATION = """
import os, time
from celery import Celery

celery = Celery("main", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
celery.conf.task_default_queue = os.environ["QUEUE"]
celery.conf.task_track_started = True
celery.conf.worker_concurrency = 1
celery.conf.beat_schedule = {"often": {"task": "main.sleep", "schedule": 0.1, "args": [0]}}

@celery.task
def sleep(seconds):
    time.sleep(seconds)
    return "slept"
"""


@pytest.fixture
def application(tmp_path: Path, redis_url: str) -> Iterator[tuple[Path, dict[str, str], Celery]]:
    """A folder with a `main.py`, the environment to run it in, and a client of it."""
    folder = tmp_path / "application"
    folder.mkdir()
    (folder / "main.py").write_text(APPLICATION)
    queue = f"compose-{uuid.uuid4().hex}"
    schedule = str(tmp_path / "schedule")
    env = environment(BROKER=redis_url, QUEUE=queue, BEAT_SCHEDULE_FILE=schedule)
    with Celery("client", broker=redis_url, backend=redis_url, set_as_current=False) as client:
        client.conf.task_default_queue = queue
        yield folder, env, client
        with client.connection_for_write() as connection:
            connection.default_channel.queue_purge(queue)
        client.backend.client.connection_pool.disconnect()


def sleeping(client: Celery, seconds: float) -> AsyncResult:
    result: AsyncResult = client.send_task("main.sleep", [seconds])
    eventually(lambda: result.state == "STARTED", "the task has started")
    return result


READY = " ready."

# Not "beat: Starting": a SIGTERM in the next milliseconds finds Celery's beat half made.
SENDING = "Sending due task"

# More than the 5 s after which watchfiles' own command would kill the worker.
LONG = 5.5


def test_only_an_edited_py_reloads_the_worker_and_no_task_is_lost(
    application: tuple[Path, dict[str, str], Celery], tmp_path: Path
) -> None:
    folder, env, client = application
    command = ("bash", SCRIPTS / "start-celeryworker")
    with Script(*command, folder=tmp_path, cwd=folder, env=env | {"RELOAD": "true"}) as worker:
        worker.wait_for(READY)
        result = sleeping(client, 4)
        (folder / "notes.txt").write_text("not code")
        time.sleep(2)  # changes are gathered for up to 1.6 s
        assert "Reloading" not in worker.output
        with (folder / "main.py").open("a") as source:
            source.write("print('the edited code')\n")
        worker.wait_for("Warm shutdown")
        assert result.get(timeout=10) == "slept"
        worker.wait_for(READY, count=2)
        assert "the edited code" in worker.output
        assert worker.output.count("Reloading") == 1
        assert worker.stop() == 0
        eventually(lambda: not worker.left_behind(), "no process is left", 5)


def test_sigterm_under_reload_finishes_the_task(
    application: tuple[Path, dict[str, str], Celery], tmp_path: Path
) -> None:
    folder, env, client = application
    command = ("bash", SCRIPTS / "start-celeryworker")
    with Script(*command, folder=tmp_path, cwd=folder, env=env | {"RELOAD": "true"}) as worker:
        worker.wait_for(READY)
        result = sleeping(client, LONG)
        assert worker.stop() == 0
        assert result.get(timeout=1) == "slept"
        assert worker.output.count(READY) == 1
        eventually(lambda: not worker.left_behind(), "no process is left", 5)


def test_beat_starts_over_what_a_killed_one_left(
    application: tuple[Path, dict[str, str], Celery], redis_url: str, tmp_path: Path
) -> None:
    folder, env, client = application
    queue = client.conf.task_default_queue
    (folder / "celerybeat.pid").write_text(f"{os.getpid()}\n")
    before = set(folder.iterdir())
    schedule = Path(env["BEAT_SCHEDULE_FILE"])
    for end, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)]:
        command = ("bash", SCRIPTS / "start-celerybeat")
        with (
            Script(*command, folder=tmp_path, cwd=folder, env=env) as beat,
            Redis.from_url(to_redis_py(redis_url)) as redis,
        ):
            redis.delete(queue)
            beat.wait_for(SENDING)
            # Celery's beat ends with 1 when it is told to end in the middle of sending.
            eventually(lambda: bool(redis.llen(queue)), "the message is in the queue", 5)
            beat.process.send_signal(end)
            assert beat.wait() == code
        assert list(schedule.parent.glob(f"{schedule.name}*"))
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def fetch(script: Script, url: str, timeout: float = 20.0) -> str:
    """What `url` answers, as soon as the script serves it."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                body: bytes = response.read()
                return body.decode()
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except OSError:
            assert script.process.poll() is None, f"ended:\n{script.output}"
            assert time.monotonic() < deadline, url
            time.sleep(0.05)


def test_flower_serves_and_ends(
    application: tuple[Path, dict[str, str], Celery], tmp_path: Path
) -> None:
    folder, env, _ = application
    port = free_port()
    command = ("bash", SCRIPTS / "start-flower")
    with Script(
        *command, folder=tmp_path, cwd=folder, env=env | {"FLOWER_PORT": str(port)}
    ) as flower:
        assert "Flower" in fetch(flower, f"http://127.0.0.1:{port}/")
        assert flower.stop() == 0
        assert not flower.left_behind()


# --- the start scripts with the reference application ------------------------------------------


@pytest.fixture
def reference_env(
    postgres: Cluster, database: str, redis_url: str, tmp_path: Path
) -> dict[str, str]:
    return environment(
        FASTAPI_CONFIG="development",
        DATABASE_URL=postgres.url(database=database),
        CELERY_BROKER_URL=redis_url,
        CELERY_RESULT_BACKEND=redis_url,
        WS_MESSAGE_QUEUE=redis_url,
        BEAT_SCHEDULE_FILE=str(tmp_path / "schedule"),
    )


def start_reference(name: str, folder: Path, env: Mapping[str, str], **more: str) -> Script:
    """The script as the image runs it: behind the entrypoint."""
    command = ("bash", ENTRYPOINT, "bash", SCRIPTS / name)
    return Script(*command, folder=folder, cwd=REFERENCE, env=dict(env) | more)


def test_web_migrates_and_answers(
    reference_env: dict[str, str], postgres: Cluster, database: str, tmp_path: Path
) -> None:
    port = free_port()
    with start_reference("start", tmp_path, reference_env, PORT=str(port)) as web:
        assert fetch(web, f"http://127.0.0.1:{port}/health-check") == '{"status":"ok"}'
        assert AVAILABLE in web.stderr.splitlines()
        assert postgres.execute("SELECT version_num FROM alembic_version", database=database)
        # uvicorn raises the signal again once it has shut down.
        assert web.stop() in {0, -signal.SIGTERM}
        assert "Application shutdown complete" in web.output
        eventually(lambda: not web.left_behind(), "no process is left", 5)


def test_web_ends_under_reload(reference_env: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    env = reference_env | {"RELOAD": "true"}
    with start_reference("start", tmp_path, env, PORT=str(port)) as web:
        assert fetch(web, f"http://127.0.0.1:{port}/health-check") == '{"status":"ok"}'
        assert web.stop() == 0
        eventually(lambda: not web.left_behind(), "no process is left", 5)


def test_worker_of_the_reference_application(
    reference_env: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    with start_reference("start-celeryworker", tmp_path, reference_env) as worker:
        worker.wait_for(READY)
        assert "project.users.tasks.divide" in worker.output
        assert worker.stop() == 0
        eventually(lambda: not worker.left_behind(), "no process is left", 5)


def test_beat_of_the_reference_application(
    reference_env: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    with Redis.from_url(to_redis_py(redis_url)) as redis:
        redis.delete("default", *redis.scan_iter("celeriac:beat:*"))  # a killed beat's lease, too
    with (
        start_reference("start-celerybeat", tmp_path, reference_env) as beat,
        Redis.from_url(to_redis_py(redis_url)) as redis,
    ):
        beat.wait_for(SENDING)
        # Celery's beat ends with 1 when it is told to end in the middle of sending.
        eventually(lambda: bool(redis.llen("default")), "the message is in the queue", 5)
        assert beat.stop() in (0, 1)
        assert not beat.left_behind()


def test_flower_of_the_reference_application(reference_env: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    with start_reference("start-flower", tmp_path, reference_env, FLOWER_PORT=str(port)) as flower:
        assert "Flower" in fetch(flower, f"http://127.0.0.1:{port}/")
        assert flower.stop() == 0
        assert not flower.left_behind()
