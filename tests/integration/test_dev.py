"""`celeriac dev` with real processes, on throw-away projects."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import create_autospec
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from celeriac.cli import supervisor
from celeriac.cli.output import LONGEST_LINE, Console, Lines
from celeriac.cli.project import extra_processes
from celeriac.cli.watchdog import Watchdog
from celeriac.errors import ConfigurationError

MAIN = """
import time
from pathlib import Path

from celery import Celery
from fastapi import FastAPI

celery = Celery("worker")
app = FastAPI()
VERSION = 1


@celery.task
def divide(x, y):
    return x / y


@celery.task(acks_late=True)
def slow(path, seconds):
    file = Path(path)
    again = file.exists()
    with file.open("a") as out:
        out.write("started\\n")
    time.sleep(0 if again else seconds)
    with file.open("a") as out:
        out.write("finished\\n")


@app.get("/version")
def version():
    return VERSION


@app.post("/divide")
def start_divide(x: float, y: float):
    return divide.delay(x, y).id


@app.post("/slow")
def start_slow(path: str, seconds: float):
    return slow.delay(path, seconds).id


@app.get("/result")
def result(id: str):
    found = celery.AsyncResult(id)
    return [found.state, found.result]
"""

UNSET = (
    "REDIS_URL",
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
    "DATABASE_URL",
    "NO_COLOR",
    "PYTHONDONTWRITEBYTECODE",  # doubles the time of every start
)
COMMAND = (sys.executable, "-c", "from celeriac.cli import main; main()", "dev")
BRIEF = ("--no-flower", "--no-beat")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in UNSET} | more


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    def lives(process: psutil.Process) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if lives(process)]


class Dev:
    """A running `celeriac dev` and what it has printed so far."""

    def __init__(self, folder: Path, *options: str, **env: str) -> None:
        self.port = free_port()
        self.flower_port = free_port()
        self.folder = folder
        ports = ("--port", str(self.port), "--flower-port", str(self.flower_port))
        self.process = subprocess.Popen(
            [*COMMAND, *ports, *options],
            cwd=folder,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def expect(self, pattern: str, timeout: float = 20) -> str:
        found: list[str] = []

        def seen() -> bool:
            found[:] = [line for line in list(self.lines) if re.search(pattern, line)]
            assert found or self.process.poll() is None, f"ended early:\n{self.text}"
            return bool(found)

        try:
            eventually(seen, timeout, pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return found[0]

    def up(self) -> "Dev":
        self.expect("for another shell", 40)
        return self

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def child(self, word: str) -> psutil.Process:
        """The direct child with `word` in its command line."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if word in " ".join(child.cmdline()))

    def call(self, method: str, path: str) -> object:
        with urlopen(Request(f"http://127.0.0.1:{self.port}{path}", method=method)) as answer:
            return json.load(answer)

    def divides(self) -> None:
        """A task sent from the project's own endpoint finishes."""
        task = self.call("POST", "/divide?x=1&y=2")
        eventually(
            lambda: self.call("GET", f"/result?id={task}") == ["SUCCESS", 0.5], 10, "the result"
        )

    def wait(self, timeout: float = 10) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def close(self) -> None:
        processes = self.tree() if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            for process in alive(processes):
                process.kill()
            self.process.wait()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()


Start = Callable[..., Dev]


STUBBORN = """
import os, signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
time.sleep(60)
"""


def add_stubborn_process(folder: Path) -> None:
    """A process that hears no SIGTERM, with a child of the same kind."""
    (folder / "stubborn.py").write_text(STUBBORN)
    (folder / "pyproject.toml").write_text(
        "[tool.celeriac.dev.processes.stubborn]\ncommand = 'python stubborn.py'\n"
    )


def write_project(folder: Path) -> Path:
    (folder / "main.py").write_text(MAIN)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command in `tmp_path`; ends what a test left running."""
    write_project(tmp_path)
    running: list[Dev] = []

    def starting(*options: str, **env: str) -> Dev:
        running.append(Dev(tmp_path, *options, **env))
        return running[-1]

    try:
        yield starting
    finally:
        for dev in running:
            dev.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One run with all that there is, for the tests that leave it working."""
    folder = write_project(tmp_path_factory.mktemp("project with space"))
    dev = Dev(folder)
    try:
        yield dev.up()
    finally:
        dev.close()


def refusal(folder: Path, *options: str, **env: str) -> str:
    """The one line that a start ends with; nothing was started before it."""
    done = subprocess.run(
        [*COMMAND, *BRIEF, *options],
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    line, *more = done.stderr.splitlines()
    assert not more, done.stderr
    assert line.startswith("error: ")
    return line


def test_a_task_sent_from_the_projects_own_endpoint_finishes(everything: Dev) -> None:
    everything.divides()


def test_the_table_names_every_address(everything: Dev) -> None:
    rows = [line.split("| ")[1].split() for line in everything.lines if "celeriac | " in line]
    assert ["web", f"http://127.0.0.1:{everything.port}", "ready"] in rows
    assert ["flower", f"http://127.0.0.1:{everything.flower_port}", "ready"] in rows
    assert ["worker", "-", "ready"] in rows
    assert ["beat", "-", "ready"] in rows
    assert any(row[0] == "redis" and row[-1] == "ready" for row in rows)


def test_output_is_plain_when_nobody_looks_at_a_terminal(everything: Dev) -> None:
    assert "\x1b" not in everything.text
    assert all(re.match(r"(web|worker|beat|flower|celeriac) +\| ", it) for it in everything.lines)


def test_the_env_file_is_private_and_leads_another_shell_to_the_broker(everything: Dev) -> None:
    file = everything.folder / ".data" / "env"
    assert file.stat().st_mode & 0o777 == 0o600
    shell = f". {str(file)!r}; exec {sys.executable} -c " + (
        "'import main; print(main.divide.delay(3, 2).get(timeout=10))'"
    )
    done = subprocess.run(
        ["sh", "-c", shell],
        cwd=everything.folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1.5\n", done.stderr


def test_a_second_runner_on_the_same_data_is_refused(everything: Dev) -> None:
    line = refusal(everything.folder)
    assert str(everything.folder / ".data") in line
    assert f"pid {everything.process.pid}" in line


def test_a_killed_worker_is_named_and_started_again(everything: Dev) -> None:
    everything.child(" worker ").kill()
    everything.expect(r"celeriac \| worker ended \(SIGKILL\); starting it again in 0\.5 s")
    everything.divides()


def test_a_killed_valkey_is_started_again(everything: Dev) -> None:
    everything.child("valkey-server").kill()
    everything.expect(r"celeriac \| redis is back")
    eventually(lambda: works(everything), 15, "a task after the restart")


def works(dev: Dev) -> bool:
    try:
        dev.divides()
    except URLError:  # the web process meets the broken connection once
        return False
    return True


def test_a_killed_watchdog_is_started_again(everything: Dev) -> None:
    killed = everything.child("watchdog.py")
    killed.kill()
    everything.expect(r"celeriac \| the watchdog was gone")
    assert everything.child("watchdog.py").pid != killed.pid


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        line = refusal(write_project(tmp_path), "--port", str(port))
    assert (
        line == f"error: port {port} (web) is taken by another program; choose another with --port"
    )
    assert not (tmp_path / ".data" / "valkey").exists()


def test_a_stop_is_quick_and_the_running_task_is_run_again(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    add_stubborn_process(tmp_path)
    dev = start(*BRIEF, "--no-reload").up()
    dev.call("POST", f"/slow?path={done}&seconds=30")
    eventually(done.exists, 10, "the task runs")
    processes = dev.tree()
    began = time.monotonic()
    dev.process.terminate()
    assert dev.wait() == 0
    assert time.monotonic() - began < 5
    assert alive(processes) == []
    assert not (tmp_path / ".data" / "env").exists()

    (tmp_path / "pyproject.toml").unlink()
    start(*BRIEF, "--no-reload").up()
    eventually(lambda: done.read_text() == "started\nstarted\nfinished\n", 15, "the second run")


def test_a_second_ctrl_c_ends_everything_at_once(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    dev = start(*BRIEF, "--no-reload").up()
    dev.call("POST", f"/slow?path={done}&seconds=30")
    eventually(done.exists, 10, "the task runs")
    processes = dev.tree()
    dev.process.send_signal(signal.SIGINT)
    dev.expect("Warm shutdown")
    began = time.monotonic()
    dev.process.send_signal(signal.SIGINT)
    assert dev.wait() == 0
    assert time.monotonic() - began < 1.5
    assert alive(processes) == []


def test_a_killed_runner_leaves_no_process_behind(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    add_stubborn_process(tmp_path)
    dev = start("--no-beat").up()
    dev.call("POST", f"/slow?path={done}&seconds=30")
    eventually(done.exists, 10, "the task runs")
    processes = dev.tree()
    assert len(processes) >= 9  # runner, watchdog, valkey, web, flower, worker, pool, two stubborn
    sockets = Path(re.findall(r"redis +(\S+)", dev.text)[0]).parent
    dev.process.kill()
    try:
        eventually(lambda: not alive(processes), 6, "all processes gone")
    finally:
        for process in alive(processes):
            process.kill()
    eventually(lambda: not sockets.exists(), 2, "the socket's directory gone")


def test_closed_output_ends_everything(tmp_path: Path) -> None:
    port = free_port()
    command = [*COMMAND, *BRIEF, "--no-reload", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=write_project(tmp_path), env=environment(), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        while b"for another shell" not in process.stdout.readline():
            pass
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        process.stdout.close()
        with urlopen(f"http://127.0.0.1:{port}/version"):
            pass  # its line in the log finds nobody
        assert process.wait(6) == 0
        assert alive(processes) == []
    finally:
        process.terminate()
        process.wait(10)


def test_code_is_reloaded_and_a_running_task_finishes(start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    (tmp_path / ".venv").mkdir()
    dev = start(*BRIEF).up()
    dev.call("POST", f"/slow?path={done}&seconds=5")
    eventually(done.exists, 10, "the task runs")
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / ".data" / "generated.py").write_text("no code of the project")
    (tmp_path / ".venv" / "library.py").write_text("nor this")
    (tmp_path / "main.py").write_text(MAIN.replace("VERSION = 1", "VERSION = 2"))
    dev.expect(r"celeriac \| main\.py changed: restarting web, worker$")
    dev.expect(r"worker1\.2@\S+ ready")
    eventually(lambda: version(dev) == 2, 10, "the new code answers")
    dev.divides()
    eventually(lambda: "finished" in done.read_text(), 10, "the old worker's task ends")
    assert done.read_text() == "started\nfinished\n"
    assert dev.text.count(" changed: restarting") == 1


def version(dev: Dev) -> object:
    try:
        return dev.call("GET", "/version")
    except URLError:
        return None


def test_code_that_does_not_start_is_tried_again_when_it_changes(
    start: Start, tmp_path: Path
) -> None:
    dev = start(*BRIEF).up()
    (tmp_path / "main.py").write_text("raise RuntimeError('half a thought')")
    dev.expect(r"celeriac \| web ended \(exit code 1\); starting it again in 0\.5 s")
    (tmp_path / "main.py").write_text(MAIN.replace("VERSION = 1", "VERSION = 3"))
    eventually(lambda: version(dev) == 3, 15, "the mended code answers")


def test_a_change_ends_the_wait_for_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 60.0)
    said: asyncio.Queue[str] = asyncio.Queue()
    watchdog = create_autospec(Watchdog, instance=True)
    console = create_autospec(Console, instance=True)
    console.say.side_effect = said.put_nowait

    async def scenario() -> None:
        keeper = supervisor.Supervisor(console, watchdog)
        spec = supervisor.Spec(name="web", command=("false",), env={}, reloads=True)
        service = supervisor.Service(spec, keeper)
        running = keeper.watch(service.run())
        async with asyncio.timeout(10):
            assert await said.get() == "web ended (exit code 1); starting it again in 60 s"
            service.reload()
            assert "ended" in await said.get()
        running.cancel()
        await keeper.stop(asyncio.Event())

    asyncio.run(scenario())


def test_an_unreachable_redis_is_named_without_its_password(tmp_path: Path) -> None:
    port = free_port()
    line = refusal(write_project(tmp_path), REDIS_URL=f"redis://:secret@127.0.0.1:{port}/0")
    assert f"REDIS_URL redis://:**@127.0.0.1:{port}/0 does not answer" in line
    assert "refused" in line
    assert "secret" not in line


def test_a_redis_named_in_the_env_file_is_used(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / ".env").write_text(f"REDIS_URL=redis://127.0.0.1:{free_port()}/0\n")
    assert "REDIS_URL" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "no module main"),
        (("--celery", "other.celery"), "no module other"),
    ],
)
def test_a_missing_module_is_named(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    assert named in refusal(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--celery", "main.nothing"), "main has no 'nothing'"),
        (("--app", "main:nothing"), "main has no 'nothing'"),
        (("--celery", "main.app"), "main.app is a FastAPI, not a Celery app"),
        (("--app", "main:celery"), "main:celery is a Celery, not a web application"),
    ],
)
def test_a_wrong_name_is_named(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    assert named in refusal(write_project(tmp_path), *options)


def test_an_application_that_cannot_be_imported_says_where(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("x = 1\nprint(undefined)\n")
    line = refusal(tmp_path)
    assert "NameError: name 'undefined' is not defined" in line
    assert "main.py:2" in line


def test_a_failed_migration_is_told_in_one_line(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n")
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "env.py").write_text("raise RuntimeError('no such column')\n")
    line = refusal(tmp_path)
    assert line == "error: alembic upgrade head failed: RuntimeError: no such column"


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("[tool.celeriac.dev.procs.stub]\ncommand = 'true'", "tool.celeriac.dev.procs"),
        ("[tool.celeriac.dev.processes.stub]\ncmd = 'true'", "stub.cmd"),
        ("[tool.celeriac.dev.processes.stub]\nport = 1", "stub.command is missing"),
        ("[tool.celeriac.dev.processes.stub]\ncommand = 'true'\nport = '1'", "stub.port must be"),
        ("[tool.celeriac.dev.processes.stub]\ncommand = 'true {port}'", "stub.command uses {port}"),
        (
            "[tool.celeriac.dev.processes.stub]\ncommand = 'no-such-program'",
            "stub.command: no-such",
        ),
        ("[tool.celeriac.dev.processes.web]\ncommand = 'true'", "the name web is taken"),
        ("[tool.celeriac.dev.processes]\nstub = 'true'", "processes.stub must be a table"),
        ("[tool", "pyproject.toml is not TOML"),
    ],
)
def test_a_wrong_process_table_is_named(tmp_path: Path, table: str, named: str) -> None:
    (tmp_path / "pyproject.toml").write_text(table)
    with pytest.raises(ConfigurationError) as raised:
        extra_processes(tmp_path, shift=0, taken=["web"])
    assert named in str(raised.value)


def test_a_misspelt_process_table_stops_the_start(tmp_path: Path) -> None:
    table = "[tool.celeriac.dev.processes.stub]\ncmd = 'true'"
    (write_project(tmp_path) / "pyproject.toml").write_text(table)
    assert "tool.celeriac.dev.processes.stub.cmd" in refusal(tmp_path)


def test_lines_survive_whatever_a_child_writes() -> None:
    seen: list[str] = []
    lines = Lines(seen.append)
    for data in (b"one\ntw", b"o\r\n\xff\n", b"x" * (LONGEST_LINE + 1), b"\nlast"):
        lines.feed(data)
    lines.finish()
    assert seen == ["one", "two", "\ufffd", "x" * LONGEST_LINE, "x", "last"]


def test_the_projects_own_processes_run_beside(start: Start, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.celeriac.dev.processes.stub]\n"
        "command = 'python -m http.server --bind 127.0.0.1 {port}'\n"
        "port = 8110\n"
        "env = { STUB_URL = 'http://127.0.0.1:{port}', OTHER = 'ours' }\n"
    )
    endpoint = "\n@app.get('/env')\ndef env():\n    import os\n    return dict(os.environ)\n"
    (tmp_path / "main.py").write_text(MAIN + endpoint)
    dev = start(*BRIEF, "--no-reload", OTHER="the user's").up()
    shifted = f"http://127.0.0.1:{dev.port + 100}"
    dev.expect(rf"stub +{shifted} +ready")
    with urlopen(shifted) as answer:
        assert b"main.py" in answer.read()
    env = dev.call("GET", "/env")
    assert isinstance(env, dict)
    assert (env["STUB_URL"], env["OTHER"]) == (shifted, "the user's")
