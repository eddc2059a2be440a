"""`celeriac health`, beside real workers, beats and servers."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from celeriac.embedded import Valkey
from support import (
    Process,
    clean_environment,
    empty_redis,
    eventually,
    free_port,
    given,
    python,
    wanted,
)
from workers import APPS, POOLS, Worker

CELERIAC = Path(sys.executable).with_name("celeriac")


class Probe:
    """`celeriac health` for the processes that report into one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"CELERIAC_HEALTH_DIR": str(folder)}

    def __call__(self, *arguments: str) -> tuple[int, str]:
        ended = subprocess.run(
            [CELERIAC, "health", *arguments],
            env=clean_environment(**self.env), capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert ended.stderr == ""
        assert ended.stdout.count("\n") == 1
        return ended.returncode, ended.stdout.strip()

    def becomes(self, code: int, words: str, *arguments: str, timeout: float = 25.0) -> str:
        """Wait for an answer with these words; it comes with this exit code."""
        said = ""

        def found() -> bool:
            nonlocal said
            ended, said = self(*arguments)
            return words in said and ended == code

        eventually(found, timeout, what=f"{words!r}, {code}")
        return said


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(tmp_path / "health")


@contextmanager
def worker(pool: str, url: str, probe: Probe) -> Iterator[Worker]:
    with Worker("health_app", pool, url, url, **probe.env) as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """One that a test may stop."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.mark.parametrize("pool", list(POOLS))
def test_a_worker_is_ready_until_it_consumes_no_queue(
    pool: str, valkey: Valkey, probe: Probe
) -> None:
    empty_redis(valkey.celery_url)
    assert probe("worker") == (1, "no worker has reported on this machine")
    with worker(pool, valkey.celery_url, probe) as running:
        probe.becomes(0, f"worker {running.node} is ready", "worker", "--ready")
        running.control("cancel_consumer", queue=running.queue)
        probe.becomes(1, "is not ready: it consumes no queue, for", "worker", "--ready")
        assert probe("worker")[0] == 0
        running.control("add_consumer", queue=running.queue)
        probe.becomes(0, "is ready", "worker", "--ready")
        running.process.signal(signal.SIGTERM)
        running.process.wait()
        assert probe("worker")[0] == 1
    assert list(probe.folder.iterdir()) == []


@pytest.mark.parametrize("pool", list(POOLS))
def test_a_worker_that_stands_still_is_not_alive(pool: str, valkey: Valkey, probe: Probe) -> None:
    empty_redis(valkey.celery_url)
    with worker(pool, valkey.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        running.control("stand_still", seconds=60)
        probe.becomes(1, "is not alive: its main loop has stood", "worker", "--within", "5")
        running.process.signal(signal.SIGSTOP)
        probe.becomes(1, "is not alive: silent for", "worker", "--within", "5")
        running.process.signal(signal.SIGKILL)
        running.process.wait()
        probe.becomes(1, "no worker that runs has reported", "worker")


def test_a_blocked_event_loop_of_tasks_is_noticed(valkey: Valkey, probe: Probe) -> None:
    empty_redis(valkey.celery_url)
    with worker("celeriac", valkey.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        running.send("block", 12.0)
        probe.becomes(1, "the event loop of its tasks has stood", "worker", "--within", "5")
        probe.becomes(0, "is ready", "worker", "--within", "5")


def test_a_solo_worker_lives_while_its_task_holds_the_main_loop(
    valkey: Valkey, probe: Probe
) -> None:
    empty_redis(valkey.celery_url)
    with worker("solo", valkey.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        running.send("work", 60.0)
        running.process.wait_for(r"Task health_app.work\[\S+ received")
        report = next(probe.folder.glob("worker-*.json"))
        first = json.loads(report.read_text())["written"]
        eventually(lambda: json.loads(report.read_text())["written"] > first + 7, 20)
        assert probe("worker", "--within", "5")[0] == 0


@pytest.mark.parametrize("pool", ["prefork", "celeriac"])
def test_a_worker_without_its_broker_is_alive_and_not_ready(
    pool: str, server: Valkey, probe: Probe
) -> None:
    with worker(pool, server.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        server.stop()
        said = probe.becomes(1, "is not ready: it is not connected", "worker", "--ready")
        assert said.endswith(" s")
        for _ in range(3):  # while it tries again and again
            probe.becomes(0, "is alive; not ready", "worker", "--within", "6")
        server.start()
        probe.becomes(0, "is ready", "worker", "--ready", timeout=40)
        assert running.process.running


def test_a_closed_channel_is_noticed(valkey: Valkey, probe: Probe) -> None:
    empty_redis(valkey.celery_url)
    with worker("celeriac", valkey.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        running.control("close_channel")
        probe.becomes(1, "is not ready: ", "worker", "--ready")
        assert probe("worker")[0] == 0


def test_a_worker_that_takes_nothing_while_messages_wait_is_not_ready(
    valkey: Valkey, probe: Probe
) -> None:
    empty_redis(valkey.celery_url)
    with worker("celeriac", valkey.celery_url, probe) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        running.control("forget_channel")
        running.send("work", 0.0)
        running.send("work", 0.0)  # the first may still be on its way
        words = f"is not ready: messages wait in {running.queue} and it takes none"
        probe.becomes(1, words, "worker", "--ready")
        assert probe("worker")[0] == 0


@pytest.mark.parametrize("broker", ["embedded", *wanted("rabbitmq", "TEST_AMQP_URL")])
def test_a_worker_that_idles_stays_ready(broker: str, valkey: Valkey, probe: Probe) -> None:
    """The broker is asked what waits, many times over."""
    url = valkey.celery_url if broker == "embedded" else given("TEST_AMQP_URL")
    empty_redis(valkey.celery_url)
    with Worker("health_app", "celeriac", url, valkey.celery_url, **probe.env) as running:
        probe.becomes(0, "is ready", "worker", "--ready")
        report = next(probe.folder.glob("worker-*.json"))
        first = json.loads(report.read_text())
        eventually(lambda: json.loads(report.read_text())["written"] > first["written"] + 13, 20)
        assert json.loads(report.read_text())["since"] == first["since"]
        running.control("cancel_consumer", queue=running.queue)
        probe.becomes(1, "is not ready: it consumes no queue", "worker", "--ready")


def test_a_worker_that_is_busy_is_ready_however_much_waits(valkey: Valkey, probe: Probe) -> None:
    empty_redis(valkey.celery_url)
    with Worker("health_app", "prefork", *[valkey.celery_url] * 2, "-c1", **probe.env) as running:
        for _ in range(20):
            running.send("work", 14.0)
        report = next(probe.folder.glob("worker-*.json"))
        first = json.loads(report.read_text())["written"]
        eventually(lambda: json.loads(report.read_text())["written"] > first + 12, 20)
        assert probe("worker", "--ready")[0] == 0


def test_of_several_workers_each_counts_or_the_one_that_is_named(
    valkey: Valkey, probe: Probe
) -> None:
    empty_redis(valkey.celery_url)
    url = valkey.celery_url
    with worker("threads", url, probe) as one, worker("threads", url, probe) as other:
        probe.becomes(0, "2 processes are well", "worker", "--ready")
        one.control("cancel_consumer", queue=one.queue)
        probe.becomes(1, f"worker {one.node} is not ready", "worker", "--ready")
        assert probe("worker", "--ready", "--name", other.node)[0] == 0
        assert probe("worker", "--name", "nobody@here")[0] == 1


def start_beat(url: str, probe: Probe, file: Path) -> Process:
    env = {"BROKER": url, "BACKEND": url, "SCHEDULE": '{"often": {"every": 0.5}}'} | probe.env
    command = ("-m", "celery", "-A", "beat_app.celery", "beat", "-l", "info", "--pidfile=")
    return python(*command, "-s", file, cwd=APPS, env=clean_environment(**env))


def test_beats_are_ready_whether_they_lead_or_stand_by(
    server: Valkey, probe: Probe, tmp_path: Path
) -> None:
    url = server.celery_url
    with start_beat(url, probe, tmp_path / "one") as leader:
        leader.wait_for("beat: leading")
        probe.becomes(0, "is ready", "beat", "--ready")
        with start_beat(url, probe, tmp_path / "other") as standby:
            standby.wait_for("beat: standing by")
            probe.becomes(0, "2 processes are well", "beat", "--ready")
            leader.signal(signal.SIGSTOP)
            probe.becomes(1, "is not alive: silent", "beat", "--within", "5")
            leader.signal(signal.SIGCONT)
            server.stop()
            probe.becomes(1, "is not ready: nothing can be sent", "beat", "--ready")
            probe.becomes(0, "are well", "beat", "--within", "10")
    probe.becomes(1, "no beat that runs has reported", "beat")


def test_the_web_side_is_alive_when_it_answers_and_ready_when_it_succeeds(probe: Probe) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/well?so=1" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    port = free_port()
    base = f"http://127.0.0.1:{port}"
    assert probe("web", "--url", f"{base}/well")[0] == 1
    with HTTPServer(("127.0.0.1", port), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert probe("web", "--url", f"{base}/well?so=1", "--ready")[0] == 0
            assert probe("web", "--url", f"{base}/ill")[0] == 0
            said = f"web is not ready: {base}/ill answers 503"
            assert probe("web", "--url", f"{base}/ill", "--ready") == (1, said)
        finally:
            server.shutdown()
            thread.join()
    assert probe("web", "--url", "ftp://here")[0] == 1


def test_nobody_else_can_write_reports(probe: Probe) -> None:
    probe.folder.mkdir()
    probe.folder.chmod(0o777)
    code, said = probe("worker")
    assert code == 1
    assert "is not a directory that this user alone may write to" in said


@pytest.mark.parametrize("left", ["", "{", '{"pid": 1}', "[]"])
def test_a_report_that_is_none_is_no_worker(left: str, probe: Probe) -> None:
    probe.folder.mkdir(mode=0o700)
    (probe.folder / "worker-1.json").write_text(left)
    code, said = probe("worker")
    assert code == 1
    assert said.startswith("no worker that runs has reported")


def test_a_probe_is_cheap_and_imports_nothing_of_the_application(probe: Probe) -> None:
    heavy = ["celery", "kombu", "redis", "fastapi", "pydantic", "click", "asyncio", "ssl"]
    code = (
        "import sys; sys.argv = ['celeriac', 'health', 'worker']\n"
        "from celeriac.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print([name for name in {heavy} if name in sys.modules])"
    )
    env = clean_environment(**probe.env)
    output = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert output.splitlines()[-1] == "[]"
    before = os.times()
    for _ in range(10):
        probe("worker")
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    assert used / 10 < 0.1
