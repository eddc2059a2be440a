"""How the reference system is configured, and what it says when that is wrong."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from celeriac.embedded import Valkey
from support import (
    REFERENCE,
    clean_environment,
    eventually,
    free_port,
    python,
    run_python,
)


def run(code: str, **env: str) -> tuple[int, str, str]:
    done = run_python("-c", code, cwd=REFERENCE, env=clean_environment(**env))
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("entry", ["main", "worker"])
def test_p22_an_unknown_configuration_ends_with_one_line_that_lists_the_three(entry: str) -> None:
    code, _, error = run(f"import {entry}", FASTAPI_CONFIG="staging")
    assert code == 1
    assert error == (
        "error: FASTAPI_CONFIG='staging': expected one of development, production, testing"
    )


def test_p28_a_misspelt_option_ends_every_command_with_one_line() -> None:
    env = clean_environment(CELERY_TASK_SOFT_TIMELIMIT="2")
    for command in (["-m", "uvicorn", "main:app"], ["-m", "celery", "-A", "worker.celery", "beat"]):
        done = run_python(*command, cwd=REFERENCE, env=env)
        assert done.returncode != 0
        assert done.stderr.strip().splitlines()[-1] == (
            "error: CELERY_TASK_SOFT_TIMELIMIT is not an option of Celery; "
            "did you mean CELERY_TASK_SOFT_TIME_LIMIT?"
        )
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CELERY_BROKER_URL", "redis://production.example:6379/0"),
        ("DATABASE_URL", "postgresql://app:secret@production.example/app"),
        ("WS_MESSAGE_QUEUE", "redis://production.example:6379/0"),
    ],
)
def test_p22b_the_testing_configuration_refuses_what_is_not_on_this_machine(
    name: str, value: str
) -> None:
    code, _, error = run("import main", FASTAPI_CONFIG="testing", **{name: value})
    assert code == 1
    assert error.startswith(f"error: {name}=")
    assert "not on this machine" in error
    assert "secret" not in error
    assert len(error.splitlines()) == 1


def test_p22_the_three_configurations_differ() -> None:
    show = (
        "from main import app, celery\n"
        "print(celery.conf.task_always_eager, app.state.config.log_format,"
        " celery.conf.broker_url)"
    )
    assert run(show)[1] == "False text redis://127.0.0.1:6379/0"
    assert run(show, FASTAPI_CONFIG="production")[1] == "False json redis://127.0.0.1:6379/0"
    assert run(show, FASTAPI_CONFIG="testing")[1] == "True text memory://"


def test_p20_the_factory_can_be_called_many_times_and_the_worker_loads_no_web_side() -> None:
    code = (
        "from project import create_app\n"
        "apps = [create_app() for _ in range(3)]\n"
        "assert len({id(app.celery_app) for app in apps}) == 3\n"
        "assert all(app.celery is app.celery_app for app in apps)\n"
        "print('made', *sorted({task for app in apps for task in app.celery.tasks"
        " if 'divide' in task}))\n"
    )
    assert run(code)[1] == "made project.users.tasks.divide"
    # Of FastAPI a worker has `Depends`, by which tasks ask for their sessions; no application.
    web = ("jinja2", "project.web", "project.pages", "project.users.views", "celeriac.fastapi")
    assert run(f"import sys, worker; print([m for m in {web} if m in sys.modules])")[1] == "[]"


def test_e04_an_unknown_prefix_is_refused_at_start() -> None:
    code, _, error = run(
        "from celery import shared_task\n"
        "@shared_task(name='lowest:task')\n"
        "def task(): ...\n"
        "import worker"
    )
    assert code == 1
    assert error == (
        "error: task 'lowest:task': 'lowest' is no queue; "
        "there are default, high_priority, low_priority"
    )


def test_e03_a_route_to_an_unlisted_queue_is_refused_at_start() -> None:
    routes = '{"project.users.tasks.divide": {"queue": "nope"}}'
    code, _, error = run("import worker", CELERY_TASK_ROUTES=routes)
    assert code == 1
    assert "project.users.tasks.divide" in error
    assert "'nope'" in error


def test_e03_a_schedule_with_an_unlisted_queue_is_refused_at_start() -> None:
    schedule = '{"a": {"task": "t", "schedule": 5, "options": {"queue": "nope"}}}'
    code, _, error = run("import worker", CELERY_BEAT_SCHEDULE=schedule)
    assert code == 1
    assert error == (
        "error: schedule 'a': 'nope' is no queue; there are default, high_priority, low_priority"
    )


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_an_absent_broker_ends_worker_and_beat_with_one_line(command: str, tmp_path: Path) -> None:
    away = f"redis://:s3cret@127.0.0.1:{free_port()}/0"
    env = clean_environment(CELERY_BROKER_URL=away, CELERY_RESULT_BACKEND=away)
    options = ["-s", str(tmp_path / "schedule")] if command == "beat" else []
    done = run_python(
        *("-m", "celery", "-A", "worker.celery", command, *options), cwd=REFERENCE, env=env
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "error: the broker redis://" in last
    assert "does not answer: " in last
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_nested_connect_dict_reaches_the_driver(tmp_path: Path) -> None:
    code = (
        "import main\n"
        "from celeriac import use_app\n"
        "from project.database import get_database\n"
        "with use_app(main.celery):\n"
        "    print(get_database()._connect_args)\n"
    )
    nested = '{"server_settings": {"a": "b"}}'
    assert run(code, DATABASE_CONNECT_DICT=nested)[1] == "{'server_settings': {'a': 'b'}}"


def test_an_absent_broker_is_a_503_in_time_and_nothing_is_accepted(tmp_path: Path) -> None:
    port, away = free_port(), f"redis://127.0.0.1:{free_port()}/0"
    env = clean_environment(
        CELERY_BROKER_URL=away,
        CELERY_RESULT_BACKEND=away,
        DATABASE_URL=f"sqlite:///{tmp_path / 'a.sqlite3'}",
    )
    command = ("-m", "uvicorn", "main:app", "--port", str(port))
    with python(*command, cwd=REFERENCE, env=env) as web:
        web.wait_for("Uvicorn running")
        body = {"username": "a", "email": "a@example.com"}
        base = f"http://127.0.0.1:{port}"
        answer = httpx.post(f"{base}/users/form/", json=body, timeout=20)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert "task queue is away" in answer.json()["detail"]
        assert answer.elapsed.total_seconds() < 5
        status = httpx.get(f"{base}/users/task_status/", params={"task_id": "a"}, timeout=20)
        assert status.status_code == 503
        assert httpx.get(f"{base}/health-check").json() == {"status": "ok"}


def test_p38_eager_tasks_show_the_same_states(valkey: Valkey, tmp_path: Path) -> None:
    port, stub = free_port(), free_port()
    env = clean_environment(
        CELERY_TASK_ALWAYS_EAGER="true",
        CELERY_BROKER_URL=f"redis://127.0.0.1:{free_port()}/0",  # there is none, none is needed
        CELERY_RESULT_BACKEND=valkey.celery_url,
        MAILING_LIST_URL=f"http://127.0.0.1:{stub}",
    )
    third_party = ("-m", "uvicorn", "mailing_list:app", "--port", str(stub))
    command = ("-m", "uvicorn", "main:app", "--port", str(port))
    with (
        python(*third_party, cwd=REFERENCE, env=env) as other,
        python(*command, cwd=REFERENCE, env=env) as web,
    ):
        other.wait_for("Uvicorn running")
        web.wait_for("Uvicorn running")
        base = f"http://127.0.0.1:{port}"
        for fail_next, state in ((0, "SUCCESS"), (1, "FAILURE")):
            behaviour = {"delay": 0, "fail_next": fail_next}
            httpx.put(f"http://127.0.0.1:{stub}/behaviour", json=behaviour).raise_for_status()
            body = {"username": "a", "email": "a@example.com"}
            with httpx.Client(base_url=base) as browser:
                answer = browser.post("/users/form/", json=body)
                assert answer.status_code == 200
                task_id = answer.json()["task_id"]
                status = browser.get("/users/task_status/", params={"task_id": task_id})
                assert status.json()["state"] == state
                with watch(browser, port, task_id) as socket:
                    assert [state in frame for frame in socket] == [True]
                with watch(browser, port, task_id, after=0) as socket:
                    assert [json.loads(frame)["state"] for frame in socket] == ["STARTED", state]


def watch(browser: httpx.Client, port: int, task_id: str, **query: object) -> ClientConnection:
    """A WebSocket of the same visitor."""
    cookie = "; ".join(f"{name}={each}" for name, each in browser.cookies.items())
    address = f"ws://127.0.0.1:{port}/ws/task_status/{task_id}?{urlencode(query)}"
    return connect(address, additional_headers={"Cookie": cookie})


def test_p48_two_web_processes_two_workers_and_a_status_store_of_its_own(
    redis_server: str, tmp_path: Path
) -> None:
    with Valkey(tmp_path / "status") as status, ExitStack() as stack:
        ports = [free_port(), free_port()]
        env = clean_environment(
            CELERY_BROKER_URL=redis_server,
            CELERY_RESULT_BACKEND=redis_server,
            WS_MESSAGE_QUEUE=status.redis_url,
        )
        worker = ("-m", "celery", "-A", "worker.celery", "worker", "-l", "info", "-c", "1", "-n")
        web = ("-m", "uvicorn", "main:app", "--port")
        workers = [
            stack.enter_context(python(*worker, f"{name}@%h", cwd=REFERENCE, env=env))
            for name in ("one", "two")
        ]
        for port in ports:
            served = stack.enter_context(python(*web, str(port), cwd=REFERENCE, env=env))
            served.wait_for("Uvicorn running")
        for each in workers:
            each.wait_for(r"ready\.")
        browser = stack.enter_context(httpx.Client())
        # No third party: tasks fail. Sent through one process, watched through the other.
        for number in range(20):
            here, there = ports[number % 2], ports[1 - number % 2]
            body = {"username": "a", "email": f"a{number}@example.com"}
            answer = browser.post(f"http://127.0.0.1:{here}/users/form/", json=body)
            with watch(browser, there, answer.json()["task_id"]) as socket:
                assert [json.loads(frame) for frame in socket][-1]["state"] == "FAILURE"
        for each in workers:
            each.wait_for("received")


def test_p49_the_web_process_ends_in_time_with_sockets_open(valkey: Valkey) -> None:
    port = free_port()
    env = clean_environment(
        CELERY_BROKER_URL=valkey.celery_url, CELERY_RESULT_BACKEND=valkey.celery_url
    )
    command = ("-m", "uvicorn", "main:app", "--port", str(port))
    with python(*command, cwd=REFERENCE, env=env) as web, ExitStack() as stack:
        web.wait_for("Uvicorn running")
        browser = stack.enter_context(httpx.Client())
        body = {"username": "a", "email": "a@example.com"}
        task_id = browser.post(f"http://127.0.0.1:{port}/users/form/", json=body).json()["task_id"]
        for _ in range(50):
            socket = stack.enter_context(watch(browser, port, task_id))
            socket.recv(timeout=5)
        began = time.monotonic()
        web.stop()
        assert time.monotonic() - began < 5
        web.wait_for("Finished server process")
        assert "Traceback" not in web.output


def test_log_lines_are_json_when_asked(valkey: Valkey) -> None:
    env = clean_environment(
        LOG_FORMAT="json",
        CELERY_BROKER_URL=valkey.celery_url.replace("=0", "=3"),
        CELERY_RESULT_BACKEND=valkey.celery_url.replace("=0", "=3"),
    )
    worker = ("-m", "celery", "-A", "worker.celery", "worker", "-l", "info", "-c", "1")
    with python(*worker, cwd=REFERENCE, env=env) as worked:
        worked.wait_for(r"ready\.")
        code = "from project.users.tasks import divide; print(divide.delay(1, 2).id)"
        task_id = run_python("-c", code, cwd=REFERENCE, env=env).stdout.strip()
        worked.wait_for(r"succeeded in")
        lines = [json.loads(line) for line in worked.output.splitlines() if line[:1] == "{"]
    said = [line["message"] for line in lines if line["task_id"] == task_id]
    assert any("received" in message for message in said)
    assert any("dividing 1 by 2" in message for message in said)
    assert any("succeeded" in message for message in said)


def test_a_setting_from_the_env_file_reaches_the_application(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CELERY_TASK_SOFT_TIME_LIMIT=2\nFASTAPI_CONFIG=production\n")
    code = "from worker import celery; print(celery.conf.task_soft_time_limit)"
    env = clean_environment(PYTHONPATH=os.fspath(REFERENCE))
    done = run_python("-c", code, cwd=tmp_path, env=env)
    assert done.stdout.strip() == "2.0"


def test_a_bad_port_or_a_taken_one_is_not_silent() -> None:
    port = free_port()
    command = ("-m", "uvicorn", "main:app", "--port", str(port))
    with python(*command, cwd=REFERENCE, env=clean_environment()) as one:
        one.wait_for("Uvicorn running")
        with python(*command, cwd=REFERENCE, env=clean_environment()) as two:
            assert two.wait() != 0
            two.wait_for("address already in use")
        eventually(lambda: one.running)
