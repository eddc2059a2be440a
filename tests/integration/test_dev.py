"""`celeriac dev` with real processes, on throw-away projects."""

import asyncio
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Self
from unittest.mock import create_autospec
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import psutil
import pytest

from celeriac.cli.dev import supervisor
from celeriac.cli.dev.output import LONGEST_LINE, Console, Lines
from celeriac.cli.dev.plan import Spec, extra_processes, read_project
from celeriac.cli.dev.watchdog import Watchdog
from celeriac.errors import ConfigurationError
from support import Process, clean_environment, eventually, free_port, run_python
from system import free_base_port

MAIN = """
import os
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


@app.get("/env")
def env():
    return dict(os.environ)
"""

# What need not run is quickly imported.
SMALL = """
from celery import Celery

celery = Celery("worker")


async def app(scope, receive, send):
    pass
"""

COMMAND = ("-m", "celeriac.cli", "dev")
BRIEF = ("--no-flower", "--no-beat")


def environment(**changes: str) -> dict[str, str]:
    # Where it is set, every start takes twice as long.
    return clean_environment(PYTHONDONTWRITEBYTECODE="", **changes)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    def lives(process: psutil.Process) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if lives(process)]


class Dev(Process):
    """A running `celeriac dev`."""

    def __init__(self, folder: Path, *options: str, **env: str) -> None:
        self.folder = folder
        self.env_file = folder / ".data" / "env"
        self.port = free_base_port()
        self.flower_port = free_port()
        ports = ("--port", str(self.port), "--flower-port", str(self.flower_port))
        command = [sys.executable, *COMMAND, *ports, *options]
        super().__init__(command, cwd=folder, env=environment(**env))

    def up(self) -> Self:
        self.wait_for("for another shell", 40)
        return self

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]

    def child(self, word: str) -> psutil.Process:
        """The direct child with `word` in its command line."""
        children = psutil.Process(self.pid).children()
        return next(child for child in children if word in " ".join(child.cmdline()))

    def call(self, method: str, path: str) -> Any:
        with urlopen(Request(f"http://127.0.0.1:{self.port}{path}", method=method)) as answer:
            return json.load(answer)

    def start_slow(self, seconds: float) -> Path:
        """The file in which a task of `seconds`, now running, notes its start and its end."""
        done = self.folder / f"done-{time.monotonic_ns()}"
        self.call("POST", f"/slow?path={quote(str(done))}&seconds={seconds}")
        eventually(done.exists, what="the task runs")
        return done

    def divides(self) -> None:
        """A task sent from the project's own endpoint finishes."""
        task = self.call("POST", "/divide?x=1&y=2")
        eventually(lambda: self.call("GET", f"/result?id={task}") == ["SUCCESS", 0.5])

    def version(self) -> object:
        try:
            return self.call("GET", "/version")
        except URLError:
            return None

    def stop(self, timeout: float = 10.0) -> int:
        processes = self.tree() if self.running else []
        if self.running:
            self.signal(signal.SIGTERM)
            with suppress(pytest.fail.Exception):
                self.wait_for("stopping", 2)
            self.signal(signal.SIGINT)  # at once
        try:
            return super().stop(timeout)
        finally:
            for process in alive(processes):
                process.kill()


Start = Callable[..., Dev]


STUBBORN = """
import os, signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
time.sleep(60)
"""


def write_project(folder: Path, version: int = 1) -> Path:
    (folder / "main.py").write_text(MAIN.replace("VERSION = 1", f"VERSION = {version}"))
    return folder


def add_process(folder: Path, name: str, *lines: str) -> None:
    table = [f"[tool.celeriac.dev.processes.{name}]", *lines]
    (folder / "pyproject.toml").write_text("\n".join(table))


def add_stubborn_process(folder: Path) -> None:
    """A process that hears no SIGTERM, with a child of the same kind."""
    (folder / "stubborn.py").write_text(STUBBORN)
    add_process(folder, "stubborn", "command = 'python stubborn.py'")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command in `tmp_path`; ends what a test left running."""
    write_project(tmp_path)
    with ExitStack() as running:
        yield lambda *options, **env: running.enter_context(Dev(tmp_path, *options, **env))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One run with all that there is, for the tests that leave it working."""
    folder = write_project(tmp_path_factory.mktemp("project with space"))
    add_process(
        folder,
        "stub",
        "command = 'python -m http.server --bind 127.0.0.1 {port}'",
        "port = 8110",
        "env = { STUB_URL = 'http://127.0.0.1:{port}', OTHER = 'ours' }",
    )
    with Dev(folder, OTHER="the user's") as dev:
        yield dev.up()


def refusal(folder: Path, *options: str, **env: str) -> str:
    """The one line that a start ends with; nothing was started before it."""
    done = run_python(*COMMAND, *BRIEF, *options, cwd=folder, env=environment(**env))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    line, *more = done.stderr.splitlines()
    assert not more, done.stderr
    assert line.startswith("error: ")
    return line


def test_a_task_sent_from_the_projects_own_endpoint_finishes(everything: Dev) -> None:
    everything.divides()


def test_the_table_names_every_address(everything: Dev) -> None:
    lines = everything.output.splitlines()
    rows = [line.split("| ")[1].split() for line in lines if "celeriac | " in line]
    assert ["web", f"http://127.0.0.1:{everything.port}", "ready"] in rows
    assert ["flower", f"http://127.0.0.1:{everything.flower_port}", "ready"] in rows
    assert ["worker", "-", "ready"] in rows
    assert ["beat", "-", "ready"] in rows
    assert any(row[0] == "redis" and row[-1] == "ready" for row in rows)


def test_output_is_plain_when_nobody_looks_at_a_terminal(everything: Dev) -> None:
    assert "\x1b" not in everything.output
    line = re.compile(r"(web|worker|beat|flower|stub|celeriac) +\| ")
    assert all(map(line.match, everything.output.splitlines()))


def test_the_projects_own_processes_run_beside(everything: Dev) -> None:
    shifted = f"http://127.0.0.1:{everything.port + 100}"
    assert re.search(rf"stub +{shifted} +ready", everything.output)
    with urlopen(shifted) as answer:
        assert b"main.py" in answer.read()
    env = everything.call("GET", "/env")
    assert (env["STUB_URL"], env["OTHER"]) == (shifted, "the user's")


def test_the_env_file_is_private_and_leads_another_shell_to_the_broker(everything: Dev) -> None:
    file = everything.env_file
    assert file.stat().st_mode & 0o777 == 0o600
    program = "import main; print(main.divide.delay(3, 2).get(timeout=10))"
    shell = f". {shlex.quote(str(file))}; exec {shlex.join([sys.executable, '-c', program])}"
    command = ["sh", "-c", shell]
    done = subprocess.run(
        command, cwd=everything.folder, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "1.5\n", done.stderr


def test_every_process_is_told_where_flower_is(everything: Dev) -> None:
    url = f"http://127.0.0.1:{everything.flower_port}"
    assert everything.call("GET", "/env")["FLOWER_URL"] == url
    assert f"export FLOWER_URL={url}\n" in everything.env_file.read_text()


@pytest.mark.parametrize(
    ("option", "env"), [("--no-flower", {}), ("--flower", {"FLOWER_URL": "http://its.own"})]
)
def test_flower_is_named_only_where_it_runs_and_nobody_else_named_it(
    start: Start, option: str, env: dict[str, str]
) -> None:
    dev = start("--no-beat", "--workers=0", option, **env)
    eventually(lambda: dev.env_file.exists() and "REDIS_URL" in dev.env_file.read_text())
    assert "FLOWER_URL" not in dev.env_file.read_text()


def test_a_second_runner_on_the_same_data_is_refused(everything: Dev) -> None:
    line = refusal(everything.folder)
    assert str(everything.folder / ".data") in line
    assert f"pid {everything.pid}" in line


def test_a_killed_worker_is_named_and_started_again(everything: Dev) -> None:
    everything.child(" worker ").kill()
    everything.wait_for(r"celeriac \| worker ended \(SIGKILL\); starting it again in 0\.5 s")
    everything.divides()


def test_a_killed_valkey_is_started_again(everything: Dev) -> None:
    everything.child("valkey-server").kill()
    everything.wait_for(r"celeriac \| redis is back")
    eventually(lambda: works(everything), what="a task after the restart")


def works(dev: Dev) -> bool:
    try:
        dev.divides()
    except URLError:  # the web process meets the broken connection once
        return False
    return True


def test_a_killed_watchdog_is_started_again(everything: Dev) -> None:
    killed = everything.child("watchdog.py")
    killed.kill()
    everything.wait_for(r"celeriac \| the watchdog was gone")
    assert everything.child("watchdog.py").pid != killed.pid


def test_code_is_reloaded_and_a_running_task_finishes(everything: Dev) -> None:
    folder = everything.folder
    said = everything.output
    done = everything.start_slow(3)
    (folder / ".venv").mkdir()
    (folder / "notes.txt").write_text("no code")
    (folder / ".data" / "generated.py").write_text("no code of the project")
    (folder / ".venv" / "library.py").write_text("nor this")
    write_project(folder, version=2)
    everything.wait_for(r"celeriac \| main\.py changed: restarting web, worker, beat$")
    assert done.read_text() == "started\n"
    everything.wait_for(r"worker1\.2@\S+ ready")
    eventually(lambda: everything.version() == 2, what="the new code answers")
    everything.divides()
    eventually(lambda: "finished" in done.read_text(), what="the old worker's task ends")
    assert done.read_text() == "started\nfinished\n"
    assert everything.output.removeprefix(said).count(" changed: restarting") == 1


def test_a_reload_cuts_no_task_off_however_short_the_grace_period(
    start: Start, tmp_path: Path
) -> None:
    made = "create_celery(Settings(), worker_soft_shutdown_timeout=0.5)"
    code = MAIN.replace('Celery("worker")', made).replace(
        "from celery import Celery", "from celeriac import Settings, create_celery"
    )
    (tmp_path / "main.py").write_text(code)
    dev = start(*BRIEF).up()
    done = dev.start_slow(3)
    (tmp_path / "main.py").write_text(code.replace("VERSION = 1", "VERSION = 2"))
    dev.wait_for("Warm shutdown")
    eventually(lambda: done.read_text() == "started\nfinished\n", what="the old worker's task ends")


def test_code_that_does_not_start_is_tried_again_when_it_changes(everything: Dev) -> None:
    (everything.folder / "main.py").write_text("raise RuntimeError('half a thought')")
    everything.wait_for(r"celeriac \| web ended \(exit code 1\); starting it again in 0\.5 s")
    write_project(everything.folder, version=3)
    eventually(lambda: everything.version() == 3, what="the mended code answers")
    everything.divides()


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        line = refusal(write_project(tmp_path), "--port", str(port))
    assert (
        line == f"error: port {port} (web) is taken by another program; choose another with --port"
    )
    assert not (tmp_path / ".data" / "valkey").exists()


def test_a_stop_is_quick_and_the_running_task_is_run_again(start: Start, tmp_path: Path) -> None:
    add_stubborn_process(tmp_path)
    dev = start(*BRIEF, "--no-reload").up()
    done = dev.start_slow(30)
    processes = dev.tree()
    began = time.monotonic()
    dev.signal(signal.SIGTERM)
    assert dev.wait() == 0
    assert time.monotonic() - began < 5
    assert alive(processes) == []
    assert not dev.env_file.exists()

    (tmp_path / "pyproject.toml").unlink()
    start(*BRIEF, "--no-web", "--no-reload").up()
    eventually(lambda: done.read_text() == "started\nstarted\nfinished\n", what="the second run")


def test_a_second_ctrl_c_ends_everything_at_once(start: Start) -> None:
    dev = start(*BRIEF, "--no-reload").up()
    dev.start_slow(30)
    processes = dev.tree()
    dev.signal(signal.SIGINT)
    dev.wait_for("Warm shutdown")
    began = time.monotonic()
    dev.signal(signal.SIGINT)
    assert dev.wait() == 0
    assert time.monotonic() - began < 1.5
    assert alive(processes) == []


def test_a_killed_runner_leaves_no_process_behind(start: Start, tmp_path: Path) -> None:
    add_stubborn_process(tmp_path)
    dev = start("--no-beat").up()
    dev.start_slow(30)
    processes = dev.tree()
    assert len(processes) >= 9  # runner, watchdog, valkey, web, flower, worker, pool, two stubborn
    sockets = Path(dev.wait_for(r"redis +(\S+)")[1]).parent
    dev.signal(signal.SIGKILL)
    try:
        eventually(lambda: not alive(processes), 6, "all processes gone")
    finally:
        for process in alive(processes):
            process.kill()
    eventually(lambda: not sockets.exists(), 2, "the socket's directory gone")


def test_closed_output_ends_everything(tmp_path: Path) -> None:
    port = free_port()
    options = [*BRIEF, "--workers=0", "--no-reload", "--port", str(port)]
    command = [sys.executable, *COMMAND, *options]
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


def test_a_change_ends_the_wait_for_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 60.0)
    said: asyncio.Queue[str] = asyncio.Queue()
    watchdog = create_autospec(Watchdog, instance=True)
    console = create_autospec(Console, instance=True)
    console.say.side_effect = said.put_nowait

    async def scenario() -> None:
        keeper = supervisor.Supervisor(console, watchdog)
        spec = Spec(name="web", command=("false",), reloads=True)
        service = supervisor.Service(spec, keeper)
        keeper.watch(service.run())
        async with asyncio.timeout(10):
            assert await said.get() == "web ended (exit code 1); starting it again in 60 s"
            service.reload.set()
            assert "ended" in await said.get()
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
        (("--celery", "main.app"), "main.app is a function, not a Celery app"),
        (("--app", "main:celery"), "main:celery is a Celery, not a web application"),
    ],
)
def test_a_wrong_name_is_named(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    (tmp_path / "main.py").write_text(SMALL)
    assert named in refusal(tmp_path, *options)


def test_an_application_that_cannot_be_imported_says_where(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("x = 1\nprint(undefined)\n")
    line = refusal(tmp_path)
    assert "NameError: name 'undefined' is not defined" in line
    assert "main.py:2" in line


def test_a_failed_migration_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SMALL)
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
        ("[tool.celeriac.dev]\nweb = 1", "tool.celeriac.dev.web must be a string"),
        (
            "[tool.celeriac.dev]\nwebb = ''",
            "unknown key tool.celeriac.dev.webb",
        ),
        ("[tool.celeriac.dev.env]\nA = 1", "tool.celeriac.dev.env.A must be a string"),
        ("[tool", "pyproject.toml is not TOML"),
    ],
)
def test_a_wrong_process_table_is_named(tmp_path: Path, table: str, named: str) -> None:
    (tmp_path / "pyproject.toml").write_text(table)
    with pytest.raises(ConfigurationError) as raised:
        extra_processes(read_project(tmp_path), shift=0, taken=["web"])
    assert named in str(raised.value)


def test_an_app_that_is_named_wins_over_the_projects_own_server(tmp_path: Path) -> None:
    table = "[tool.celeriac.dev]\nweb = 'true'"
    (write_project(tmp_path) / "pyproject.toml").write_text(table)
    assert "there is no module nowhere" in refusal(tmp_path, "--app", "nowhere:app")


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
