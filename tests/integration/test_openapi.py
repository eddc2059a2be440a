"""What OpenAPI says of the routes, compared with what they answer to requests made from it."""

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from celery import Celery, states
from fastapi import FastAPI
from starlette.requests import HTTPConnection

from celeriac import adopt, dead, records
from celeriac.embedded import Valkey
from celeriac.errors import PublicError
from celeriac.fastapi import ReadTokens, attach, status_router
from support import (
    REFERENCE,
    clean_environment,
    close_results,
    empty_redis,
    eventually,
    free_port,
    python,
    run_python,
)

TOKENS = ReadTokens("0123456789abcdef")
APPS = Path(__file__).parent.parent / "apps"
# The same requests every time: what OpenAPI allows, what is just beyond it, and what chance finds.
# Half of the ids are those of tasks. Of a stream only the first event is read: it may have no end.
CONFIG = """
hooks = {hooks}
headers = {{ {headers} }}
max-stream-events = 1
request-timeout = 30
[generation]
deterministic = true
max-examples = 25
[phases]
stateful.enabled = false  # it takes for deleted what was cancelled
[checks]
allow_header_conformance.enabled = false  # FastAPI names the methods of one route, not of the path
[dictionaries]
tasks = {{ values = {tasks} }}
tags = {{ values = ['"0"', '"1"', '"2"'] }}
[parameters]
task_id = {{ dictionary = "tasks", probability = 0.5 }}
if-none-match = {{ dictionary = "tags", probability = 0.5 }}
"""
REFERENCE_CONFIG = """
[[operations]]
include-path = "/users/webhook_test/"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "502"]  # the third party is away
[[operations]]
include-path = ["/users/", "/users/user_subscribe/"]
checks.positive_data_acceptance.enabled = false  # not every address of that format is one
[[operations]]
include-path = "/users/form/"
checks.positive_data_acceptance.enabled = false  # the same, and a key serves one request
checks.unsupported_method.enabled = false  # the page is at this address too
"""


def compare(
    base: str, tasks: list[str], folder: Path, headers: dict[str, str], more: str = ""
) -> None:
    """Ask the server at `base` for all that it documents, in the name that `headers` give."""
    config = folder / "schemathesis.toml"
    told = CONFIG.format(
        hooks=json.dumps(str(APPS / "openapi_hooks.py")),
        headers=", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in headers.items()),
        tasks=json.dumps(tasks),
    )
    config.write_text(told + more)
    command = ("-m", "schemathesis.cli", "--config-file", config, "run", f"{base}/openapi.json")
    done = run_python(*command, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def celery(valkey: Valkey) -> Iterator[Celery]:
    url = valkey.celery_url
    empty_redis(url)
    app = Celery("openapi", broker=url, backend=url, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


def tasks_of(celery: Celery, owner: str) -> list[str]:
    """One task in each state, one of somebody else, one that is a dead letter too."""

    def publish(whose: str) -> str:
        """Always the same id, and so the same requests."""
        task_id = f"task-{len(ids)}"
        with records.as_owner(whose):
            celery.send_task("work", task_id=task_id, queue="nobody-listens")
        return task_id

    ids: list[str] = []
    for state, result in (
        (states.PENDING, None),
        (states.STARTED, None),
        ("PROGRESS", {"current": 1, "total": 2}),
        (states.RETRY, ValueError("once more")),
        (states.SUCCESS, {"a": [1, None, "x"]}),
        (states.FAILURE, PublicError("too_large", "Too large.")),
        (states.REVOKED, ValueError("stopped")),
    ):
        ids.append(publish(owner))
        if state != states.PENDING:
            celery.backend.store_result(ids[-1], result, state)
    message: Any = type("Message", (), {})()
    message.headers = {"id": ids[-1], "task": "work", records.OWNER: owner, "retries": 0}
    message.body, message.properties = "[[], {}, {}]", {"correlation_id": ids[-1]}
    message.content_type, message.content_encoding = "application/json", "utf-8"
    message.delivery_info = {"exchange": "", "routing_key": "celery"}
    with dead.letters(celery) as letters:
        letters.bury(message.headers, dead.message_of(message), "poison", "celery")
    return [*ids, publish("somebody else")]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    port = free_port()
    # Its own configuration of logging would keep what it says from the test.
    config = uvicorn.Config(app, port=port, log_level="warning", log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, what="the server")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def routes(celery: Celery, **options: Any) -> Iterator[str]:
    async def user(connection: HTTPConnection) -> str:
        return connection.headers.get("x-user", "")

    app = FastAPI()
    attach(app, celery)
    given: dict[str, Any] = {"owner": user, "tokens": TOKENS} | options
    app.include_router(status_router(celery, **given))
    with served(app) as base:
        yield base


def test_the_status_routes_answer_as_documented(
    celery: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with routes(celery) as base:
        compare(base, tasks_of(celery, "ada"), tmp_path, {"X-User": "ada"})
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


def test_too_many_streams_are_refused_as_documented(celery: Celery) -> None:
    with routes(celery, streams=0) as base:
        (pending, *_) = tasks_of(celery, "ada")
        answer = httpx.get(f"{base}/tasks/{pending}/events", headers={"X-User": "ada"})
        paths = httpx.get(f"{base}/openapi.json").json()["paths"]
    assert answer.status_code == 429
    documented = paths["/tasks/{task_id}/events"]["get"]["responses"]["429"]["content"]
    assert list(documented) == [answer.headers["content-type"]]


@contextmanager
def reference(redis: str, folder: Path) -> Iterator[str]:
    """The reference system's web process, without a worker and with no third party."""
    port = free_port()
    env = clean_environment(
        CELERY_BROKER_URL=redis,
        CELERY_RESULT_BACKEND=redis,
        DATABASE_URL=f"sqlite:///{folder / 'db.sqlite3'}",
        MAILING_LIST_URL=f"http://127.0.0.1:{free_port()}",
    )
    migrated = run_python("-m", "alembic", "upgrade", "head", cwd=REFERENCE, env=env)
    assert migrated.returncode == 0, migrated.stderr
    command = ("-m", "uvicorn", "main:app", "--port", str(port), "--no-access-log")
    with python(*command, cwd=REFERENCE, env=env) as web:
        web.wait_for("Application startup complete")
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in web.output, web.output


def test_the_reference_system_answers_as_documented(
    celery: Celery, valkey: Valkey, tmp_path: Path
) -> None:
    with reference(valkey.celery_url, tmp_path) as base:
        sent = httpx.post(
            f"{base}/users/form/", json={"username": "ada", "email": "ada@example.com"}
        )
        visitor = {"Cookie": f"visitor={sent.cookies['visitor']}"}
        tasks = [*tasks_of(celery, ""), sent.json()["task_id"]]
        compare(base, tasks, tmp_path, visitor, REFERENCE_CONFIG)


def test_whatever_needs_a_server_that_is_away_answers_503_as_documented(tmp_path: Path) -> None:
    with reference(f"redis://127.0.0.1:{free_port()}/0", tmp_path) as base:
        paths = httpx.get(f"{base}/openapi.json").json()["paths"]

        asked = [(path, method) for path, methods in paths.items() for method in methods]

        def ask(number: int) -> int:
            path, method = asked[number]
            user = {"username": f"ada-{number}", "email": f"ada-{number}@example.com"}
            return httpx.request(
                method,
                base + path.replace("{task_id}", "a-task"),
                params={"task_id": "a-task"},
                json=user if method == "post" else None,
                timeout=30,
            ).status_code

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, range(len(asked))))
    for (path, method), answer in zip(asked, answers, strict=True):
        documented = {int(code) for code in paths[path][method]["responses"]}
        assert answer in documented, (method, path)
        assert (answer == 503) == (503 in documented), (method, path)
