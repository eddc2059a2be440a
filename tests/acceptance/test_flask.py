"""The Flask example as a newcomer starts it, on Redis + Redis and on RabbitMQ + Redis."""

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from kombu.connection import Connection
from playwright.sync_api import Browser

from celeriac.embedded import Valkey
from support import (
    ROOT,
    Process,
    clean_environment,
    empty_redis,
    eventually,
    free_port,
    given,
    is_free,
    python,
    run_python,
    wanted,
)

EXAMPLE = ROOT / "examples" / "flask"
SERVICES = ["embedded", *wanted("redis", "TEST_REDIS_URL"), *wanted("rabbitmq", "TEST_AMQP_URL")]
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "api-config.yaml"
    config = {
        "port": free_port(),
        "secret_key": "a secret",
        "celery": {
            "broker_url": "redis://127.0.0.1:1/0",
            "result_backend": "redis://127.0.0.1:1/0",
        },
    } | changes
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value}))
    return file


class Example:
    """The web server and a worker, configured by a file and by nothing else."""

    def __init__(self, folder: Path, broker: str, backend: str) -> None:
        self.port = free_port()
        celery = {"broker_url": broker, "result_backend": backend}
        file = write(folder, port=self.port, celery=celery)
        self.env = clean_environment(FLASK_CONFIG=str(file))
        command = ["-m", "celery", "-A", "celery_worker.celery", "worker", "--loglevel=info"]
        self.worker = python(*command, cwd=EXAMPLE, env=self.env)
        self.web = python("./cli.py", cwd=EXAMPLE, env=self.env)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)

    def wait_until_ready(self) -> None:
        self.web.wait_for(r"^http://127\.0\.0\.1:\d+$")
        self.worker.wait_for(r"ready\.$")

    def start(self, **body: Any) -> str:
        answer = self.http.post("/task/", json=body)
        assert answer.status_code == 202
        found: str = answer.json()["task_id"]
        return found

    def state(self, task_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/task/{task_id}")
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        return found

    def end_of(self, task_id: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            found = self.state(task_id)
            return found if found["state"] in ("SUCCESS", "FAILURE", "REVOKED") else None

        return eventually(ended)

    def close(self) -> None:
        self.http.close()
        self.web.stop()
        self.worker.stop()


@pytest.fixture(autouse=True)
def _leaves_no_loop() -> None:
    """Instead of the check for all tests: Playwright's own loop lasts as long as the browser."""


@pytest.fixture(scope="module", params=SERVICES)
def example(
    request: pytest.FixtureRequest, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    backend = valkey.celery_url if request.param == "embedded" else given("TEST_REDIS_URL")
    empty_redis(backend)
    broker = given("TEST_AMQP_URL") if request.param == "rabbitmq" else backend
    with ExitStack() as stack:
        if request.param == "rabbitmq":
            # Before, and after: other files declare it otherwise.
            delete_queue(broker)
            stack.callback(delete_queue, broker)
        running = Example(tmp_path_factory.mktemp("flask"), broker, backend)
        stack.callback(running.close)
        running.wait_until_ready()
        yield running


def delete_queue(broker: str) -> None:
    connect = Connection(broker)  # type: ignore[no-untyped-call]
    with connect as connection, connection.channel() as channel:
        channel.queue_delete("celery")


def test_the_index_and_a_task_to_its_result(example: Example) -> None:  # P54 to P56
    assert example.http.get("/").json() == {"status": "success"}
    before = datetime.now(UTC)
    answer = example.http.post("/task/")
    assert answer.status_code == 202
    assert datetime.now(UTC) - before < timedelta(seconds=1)
    started = answer.json()
    assert re.fullmatch(UUID, started["task_id"])
    assert started == {"task_id": started["task_id"], "state": "PENDING"}
    assert example.state(started["task_id"]).keys() == {"task_id", "state"}
    ended = example.end_of(started["task_id"])
    assert ended.keys() == {"task_id", "state", "result"}
    assert ended["state"] == "SUCCESS"
    took = datetime.fromisoformat(ended["result"]) - before
    assert timedelta(seconds=5) <= took < timedelta(seconds=8)


def test_a_task_that_fails_says_why_and_is_no_error_of_the_server(example: Example) -> None:
    task_id = example.start(seconds=-1)
    assert example.end_of(task_id) == {
        "task_id": task_id,
        "state": "FAILURE",
        "error": "seconds: expected 0 to 60, got -1",
    }
    assert example.http.post("/task/", json={"seconds": "soon"}).status_code == 422


def test_an_unknown_id_is_not_found_and_never_pending(example: Example) -> None:
    for path in ("/task/unknown", "/tasks/unknown", "/tasks/unknown/events"):
        answer = example.http.get(path)
        assert (answer.status_code, answer.json()) == (404, {"detail": "unknown task"})
    assert example.http.delete("/tasks/unknown").status_code == 404


def test_a_task_is_followed_to_its_end_by_server_sent_events(example: Example) -> None:
    task_id = example.start(seconds=0.5)
    with example.http.stream("GET", f"/tasks/{task_id}/events") as stream:
        lines = [line for line in stream.iter_lines() if line.startswith(("id:", "data:"))]
    frames = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    states = [frame["state"] for frame in frames]
    assert states[-1] == "SUCCESS"
    assert states == sorted(states, key=["PENDING", "STARTED", "SUCCESS"].index)
    last = int(lines[-2][3:])
    after = {"Last-Event-ID": str(last - 1)}
    with example.http.stream("GET", f"/tasks/{task_id}/events", headers=after) as stream:
        again = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
    assert again == frames[-1:]
    ended = example.http.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": str(last)})
    assert ended.status_code == 204  # which ends an EventSource


def test_a_long_poll_answers_when_the_state_changes(example: Example) -> None:
    task_id = example.start(seconds=0.7)
    seen = ""
    states: list[str] = []
    while not states or states[-1] not in ("SUCCESS", "FAILURE"):
        headers = {"If-None-Match": seen} if seen else {}
        answer = example.http.get(f"/tasks/{task_id}", params={"wait": 8}, headers=headers)
        assert answer.status_code == 200
        seen = answer.headers["ETag"]
        states.append(answer.json()["state"])
    assert states[-1] == "SUCCESS"
    same = example.http.get(f"/tasks/{task_id}", headers={"If-None-Match": seen})
    assert (same.status_code, same.content) == (304, b"")


def test_what_waits_is_cancelled_and_never_runs(example: Example) -> None:
    ids = [example.start(seconds=2) for _ in range(2 * psutil.cpu_count() + 2)]
    last = ids[-1]
    answer = example.http.delete(f"/tasks/{last}")
    assert (answer.status_code, answer.json()["state"]) == (202, "REVOKED")
    assert example.end_of(last)["state"] == "REVOKED"
    for each in ids[:-1]:
        example.http.delete(f"/tasks/{each}")
    foreign = example.http.delete(f"/tasks/{last}", headers={"Origin": "https://elsewhere.example"})
    assert foreign.status_code == 403


def test_a_hundred_who_ask_at_once_are_all_answered(example: Example) -> None:
    task_id = example.start(seconds=0)
    example.end_of(task_id)
    with ThreadPoolExecutor(100) as threads:
        states = list(threads.map(lambda _: example.state(task_id)["state"], range(500)))
    assert set(states) == {"SUCCESS"}


WATCH = """async ([id, transports]) => {
  const { watchTask } = await import("/celeriac/client.js");
  const states = [];
  await watchTask(id, { transports, onEvent: (event) => states.push(event.state) });
  return states;
}"""


@pytest.mark.parametrize("transports", [["websocket", "sse", "poll"], ["sse"], ["poll"]], ids=str)
def test_the_browsers_client_follows_a_task(
    example: Example, browser: Browser, transports: list[str]
) -> None:
    task_id = example.start(seconds=0.5)
    page = browser.new_page()
    try:
        page.goto(f"{example.http.base_url}/")
        states = page.evaluate(WATCH, [task_id, transports])
    finally:
        page.close()
    assert states[-1] == "SUCCESS"
    assert len(states) == len(set(states))


# P51: nothing is configured when the tasks are imported.
def test_tasks_and_routes_are_imported_without_any_configuration(tmp_path: Path) -> None:
    found = run_python(
        "-c",
        "from server.controller.routes import routes; from server.controller.tasks import "
        "long_task; print(routes.name, long_task.name)",
        cwd=EXAMPLE,
        env=clean_environment(FLASK_CONFIG=str(tmp_path / "nowhere"), PYTHONPATH=str(EXAMPLE)),
    )
    assert found.stdout.split() == ["routes", "server.controller.tasks.long_task"], found.stderr


BAD = {
    "no file": (None, r"there is no \S+: make it, or say where it is with FLASK_CONFIG"),
    "no YAML": ("secret_key: hidden\nport: [1", r"\S+ is no YAML at line 2: (?!.*hidden).+"),
    "a list": ("- 1", r"\S+: expected port, secret_key and celery"),
    "empty": ("", r"\S+: expected port, secret_key and celery"),
    "a missing key": ({"secret_key": None}, r"\S+: secret_key: missing"),
    "a wrong type": ({"port": "many"}, r"\S+: port: Input should be a valid integer"),
    "a bad port": ({"port": 70000}, r"\S+: port: .+65535"),
    "an unknown key": ({"prot": 1}, r"\S+: prot: unknown key"),
    "no broker": ({"celery": {"result_backend": "redis://"}}, r"\S+: celery\.broker_url: missing"),
    "no option": (
        {"celery": {"broker_url": "redis://", "result_backend": "redis://", "task_ack_late": True}},
        r"celery\.task_ack_late in \S+ is not an option of Celery; did you mean task_acks_late\?",
    ),
    "an option's type": (
        {"celery": {"broker_url": "redis://", "result_backend": "redis://", "task_acks_late": 3}},
        r"celery\.task_acks_late in \S+: bool expected, got int",
    ),
    "no broker's URL": (
        {"celery": {"broker_url": "here", "result_backend": "redis://"}},
        r"CELERY_BROKER_URL=here is no broker's URL: .+",
    ),
}


# P53: one line, from the web server and from Celery's command.
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["./cli.py", "-m celery -A celery_worker.celery worker"])
def test_a_wrong_configuration_is_one_clear_line(tmp_path: Path, case: str, command: str) -> None:
    content, expected = BAD[case]
    file = tmp_path / "config.yaml"
    if isinstance(content, str):
        file.write_text(content)
    elif isinstance(content, Mapping):
        file = write(tmp_path, **content)
    env = clean_environment(FLASK_CONFIG=str(file))
    refused = run_python(*command.split(), cwd=EXAMPLE, env=env)
    assert refused.returncode != 0
    said = (refused.stdout + refused.stderr).strip()
    assert re.fullmatch(f"error: {expected}", said), said


def test_the_file_may_be_json_and_lies_in_secrets_by_default(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    content = yaml.safe_load(write(tmp_path).read_text())
    (tmp_path / "secrets" / "api-config.yaml").write_text(json.dumps(content))
    env = clean_environment(PYTHONPATH=str(EXAMPLE))
    with python(EXAMPLE / "cli.py", cwd=tmp_path, env=env) as web:
        web.wait_for(rf"^http://127\.0\.0\.1:{content['port']}$")


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    env = clean_environment(FLASK_CONFIG=str(write(tmp_path)))
    port = str(free_port())
    with python("./cli.py", "--port", port, cwd=EXAMPLE, env=env) as web:
        web.wait_for(rf"^http://127\.0\.0\.1:{port}$")  # the option wins over the file
        second = run_python("./cli.py", "--port", port, cwd=EXAMPLE, env=env)
    assert second.returncode != 0
    said = (second.stdout + second.stderr).strip()
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 cannot be used: .+", said), said


def test_without_a_broker_the_answer_is_503_within_the_deadline(tmp_path: Path) -> None:
    file = write(tmp_path)
    env = clean_environment(FLASK_CONFIG=str(file))
    port = yaml.safe_load(file.read_text())["port"]
    with python("./cli.py", cwd=EXAMPLE, env=env) as web:
        web.wait_for(r"^http://")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            for method, path in (("POST", "/task/"), ("GET", "/task/1"), ("GET", "/tasks/1")):
                before = time.monotonic()
                answer = http.request(method, path)
                assert answer.status_code == 503, answer.text
                assert answer.headers["Retry-After"] == "5"
                assert "away" in answer.json()["detail"]
                assert time.monotonic() - before < 5


# P60
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_it_leaves_nothing_behind(
    valkey: Valkey, tmp_path: Path, number: signal.Signals
) -> None:
    empty_redis(valkey.celery_url)
    files = set(EXAMPLE.rglob("*"))
    example = Example(tmp_path, valkey.celery_url, valkey.celery_url)
    try:
        example.wait_until_ready()
        task_id = example.start(seconds=30)
        eventually(lambda: example.state(task_id)["state"] == "STARTED")
        with example.http.stream("GET", f"/tasks/{task_id}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("id: ")
            with ThreadPoolExecutor(1) as threads:
                poll = threads.submit(example.http.get, f"/tasks/{task_id}", params={"wait": 30})
                children = psutil.Process(example.worker.pid).children(recursive=True)
                before = time.monotonic()
                example.web.signal(number)
                assert list(lines)[-1] == ""  # the stream ends, as it should
                assert example.web.wait(10) == 0
                assert time.monotonic() - before < 5
                assert poll.exception() is not None or poll.result().status_code == 200
        example.worker.signal(signal.SIGTERM)
        assert example.worker.wait(30) == 0
        assert not [child for child in children if child.is_running()]
        with pytest.raises(httpx.ConnectError):
            example.http.get("/")
        assert "Traceback" not in example.web.output
    finally:
        example.close()
    made = {file for file in set(EXAMPLE.rglob("*")) - files if "__pycache__" not in file.parts}
    assert made == set()


def test_the_old_word_order_is_answered_by_celery_itself() -> None:
    refused = run_python("-m", "celery", "worker", "-A", "celery_worker.celery", cwd=EXAMPLE)
    assert refused.returncode != 0
    assert "You are using `-A` as an option of the worker sub-command" in refused.stderr


def test_one_command_starts_the_example_with_a_valkey_of_its_own(tmp_path: Path) -> None:
    port = free_port()
    while not is_free(port - 8010 + 5557):
        port = free_port()
    command = [str(ROOT / "run"), "dev", "--port", str(port), "--example", "flask", "--no-reload"]
    with Process([*command, "--data", str(tmp_path / "data")]) as runner:
        runner.wait_for(r"^celeriac +\| +web +http\S+ +ready", timeout=60)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            task_id = http.post("/task/", json={"seconds": 0.1}).json()["task_id"]
            ended = http.get(f"/tasks/{task_id}", params={"wait": 20})
            assert ended.json()["state"] == "SUCCESS"
        runner.signal(signal.SIGTERM)
        assert runner.wait() == 0
    refused = run_python(ROOT / "run", "dev", "--example", "flsk")
    assert refused.stderr.splitlines()[-1] == "run: --example flsk: there is flask"
