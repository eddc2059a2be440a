"""Flask's edge: the application's context in every task, two applications, owners, sessions."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from flask import Flask, current_app, g, request
from flask_sqlalchemy import SQLAlchemy
from redis import Redis
from sqlalchemy import Integer, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celeriac import ConfigurationError, bridge
from celeriac.app import current_app as current_celery
from celeriac.database import Database
from celeriac.embedded import Valkey
from celeriac.errors import AmbiguousAppError
from celeriac.flask import Celeriac, ReadTokens, find_task, public, status_blueprint
from celeriac.outbox import outbox_table, use_outbox
from celeriac.store import redis_url
from celeriac.web.owners import Owner
from support import close_results, empty_redis, eventually
from web import serve
from workers import POOLS, Worker

GREETED = ["hello True", "hello", "True"]
TOKENS = ReadTokens("0123456789abcdef")


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def worker(pool: str, valkey: Valkey) -> Iterator[Worker]:
    running = Worker("flask_app", pool, valkey.celery_url, valkey.celery_url)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.mark.parametrize("suffix", ["", "_sync"])
def test_each_task_has_the_applications_context_and_a_g_of_its_own(
    worker: Worker, suffix: str
) -> None:
    sent = [worker.send(f"greet{suffix}") for _ in range(20)]
    assert [each.get(timeout=20) for each in sent] == [GREETED] * 20


@pytest.mark.parametrize("suffix", ["", "_sync"])
def test_a_direct_call_shares_the_context_and_an_eager_task_has_its_own(
    worker: Worker, suffix: str
) -> None:
    called, eager, marked = worker.send(f"nest{suffix}").get(timeout=20)
    assert called == ["hello False", "hello", "True"]
    assert eager == GREETED
    assert marked == ["True"]


@pytest.mark.parametrize("suffix", ["", "_sync"])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("success", ["NoneType False"]),
        ("error", ["ValueError False"]),
        ("retry", ["Retry False", "MaxRetriesExceededError False"]),
    ],
)
def test_the_context_is_torn_down_with_the_reason_however_a_task_ends(
    worker: Worker, suffix: str, how: str, told: list[str]
) -> None:
    """The session was removed by then."""
    key = f"end{suffix}-{how}"
    ended = worker.send(f"end{suffix}", key, how)
    ended.get(timeout=20, propagate=False)
    # The second try may begin before the first one is torn down.
    assert sorted(worker.noted(key) for _ in told) == sorted(told)


def test_the_context_is_torn_down_when_a_coroutine_is_cancelled(worker: Worker, pool: str) -> None:
    if pool != "celeriac":
        pytest.skip("others end the process, or cannot")
    sent = worker.send("end", "cancelled", "cancel")
    worker.noted("runs")
    worker.client.control.revoke(sent.id, terminate=True)
    assert worker.noted("cancelled") == "CancelledError False"


class Site:
    """A Flask application of one test, and who asks it."""

    def __init__(self, url: str, name: str = "site", **config: Any) -> None:
        self.extension = Celeriac()
        self.app = Flask(name)
        celery = {"broker_url": url, "result_backend": url, "broker_pool_limit": 0}
        self.app.config["CELERY"] = celery | {"task_create_missing_queues": True} | config
        self.extension.init_app(self.app, owner=user)
        self.app.register_blueprint(status_blueprint(owner=user, tokens=TOKENS, streams=2))

        @self.app.post("/work")
        def work() -> dict[str, str]:
            return {"task_id": self.celery.signature("work").delay().id}

        @self.app.get("/state/<task_id>")
        def state(task_id: str) -> dict[str, str]:
            return {"state": find_task(task_id, user()).state}

    @property
    def celery(self) -> Celery:
        found: Celery = self.app.extensions["celery"]
        return found

    def get(self, path: str, who: str = "", **headers: str) -> Any:
        return self._ask("GET", path, who, headers)

    def send(self, method: str, path: str, who: str = "", **headers: str) -> Any:
        return self._ask(method, path, who, headers)

    def _ask(self, method: str, path: str, who: str, headers: dict[str, str]) -> Any:
        sent = {"X-User": who} | {name.replace("_", "-"): text for name, text in headers.items()}
        return self.app.test_client().open(path, method=method, headers=sent)

    def close(self) -> None:
        close_results(self.celery.backend)


def waiting(url: str, queue: str) -> list[str]:
    """The ids of the tasks in a queue, which is empty then."""
    with Redis.from_url(redis_url(url)) as client:
        found: Any = client.lpop(queue, 100) or []
    return [json.loads(each)["headers"]["id"] for each in found]


def user() -> Owner:
    return request.headers.get("X-User", "")


@pytest.fixture
def site(redis_server: str) -> Iterator[Site]:
    made = Site(redis_server)
    yield made
    made.close()
    bridge.close()


def test_nothing_is_needed_until_it_is_given_an_application() -> None:
    extension = Celeriac()
    with pytest.raises(ConfigurationError, match=r"call init_app\(app\) first"):
        extension.send_task("work")
    app = Flask("unprepared")
    app.register_blueprint(status_blueprint(owner=public))
    app.testing = True
    with pytest.raises(ConfigurationError, match="'unprepared': call Celeriac"):
        app.test_client().get("/tasks/1")


def test_two_applications_keep_apart(valkey: Valkey, redis_server: str) -> None:
    empty_redis(valkey.celery_url)
    one = Site(redis_server, "one", task_default_queue="one")
    two = Site(redis_server, "two", task_default_queue="two")
    both = one, two
    for each in both:

        def look(name: str = each.app.name) -> tuple[str, bool, str]:
            fresh = "mark" not in g
            g.mark = name
            return current_app.name, fresh, current_celery().main

        each.celery.task(look, shared=False, name="look")
    found = {}

    def run(site: Site) -> None:
        found[site.app.name] = [site.celery.tasks["look"].apply().get() for _ in range(50)]

    threads = [threading.Thread(target=run, args=[each]) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in both:
        assert found[each.app.name] == [(each.app.name, True, each.app.name)] * 50
        with each.app.app_context():
            assert one.extension.app is each.celery  # that of the context
            assert current_celery() is each.celery
            # A context of the other one is pushed for its tasks, and gone again after them.
            other = two if each is one else one
            assert other.celery.tasks["look"]() == (other.app.name, True, other.app.name)
            assert current_app.name == each.app.name
    with pytest.raises(AmbiguousAppError):
        one.extension.send_task("work")
    for each in both:
        assert each.send("POST", "/work", "ada").status_code == 200
        assert len(waiting(redis_server, each.app.name)) == 1
        each.close()
    bridge.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"CELERY": {"task_ack_late": 1}}, r"CELERY\['task_ack_late'\] is not an option of Celery"),
        ({"CELERY_TASK_ACK_LATE": 1}, "CELERY_TASK_ACK_LATE is not an option of Celery; did you"),
        (
            {"CELERY": {"task_acks_late": "x"}},
            r"CELERY\['task_acks_late'\]: bool expected, got str",
        ),
        ({"CELERY_TASK_ACKS_LATE": 1}, "CELERY_TASK_ACKS_LATE: bool expected, got int"),
        ({"CELERY": ["redis://"]}, r"app.config\['CELERY'\]: a mapping expected, got list"),
        ({"CELERY": {"broker_url": "x"}}, "CELERY_BROKER_URL=x is no broker's URL"),
        ({"CELERY": {"publish_timeout": -1}}, "PUBLISH_TIMEOUT: Input should be greater than 0"),
        (
            {"CELERY": {"task_acks_late": True}, "CELERY_TASK_ACKS_LATE": False},
            "CELERY_TASK_ACKS_LATE contradicts app.config",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    app = Flask("wrong")
    app.config.update(config)
    with pytest.raises(ConfigurationError, match=message):
        Celeriac(app)


def test_keys_and_the_mapping_say_the_same(redis_server: str) -> None:
    app = Flask("both")
    app.config["CELERY"] = {"broker_url": redis_server, "worker_lease": 7, "timezone": None}
    app.config["CELERY_RESULT_BACKEND"] = redis_server
    app.config["CELERY_TASK_TIME_LIMIT"] = 3.5
    Celeriac(app)
    conf = app.extensions["celery"].conf
    assert (conf.broker_url, conf.result_backend) == (redis_server, redis_server)
    assert (conf.task_time_limit, conf.task_acks_late) == (3.5, True)


def test_others_tasks_and_unknown_ones_get_the_same_answer(site: Site) -> None:
    adas = site.send("POST", "/work", "ada").json["task_id"]
    token = TOKENS.of_task(adas)
    paths = [
        ("GET", "/tasks/{}"), ("GET", "/tasks/{}?wait=1"), ("GET", "/tasks/{}/events"),
        ("GET", "/state/{}"), ("DELETE", "/tasks/{}"), ("POST", "/tasks/{}/retry"),
        ("DELETE", "/tasks/{}?token=" + token), ("GET", "/tasks/{}?token=x"),
    ]  # fmt: skip
    for method, path in paths:
        for who in ("bob", ""):
            others = site.send(method, path.format(adas), who)
            unknown = site.send(method, path.format("unknown"), who)
            assert others.status_code == unknown.status_code == 404
            assert (others.data, dict(others.headers)) == (unknown.data, dict(unknown.headers))
    assert site.get(f"/tasks/{adas}", "ada").json["state"] == "PENDING"
    assert site.get(f"/state/{adas}", "ada").json == {"state": "PENDING"}
    assert site.get(f"/tasks/{adas}?token={token}").json["task_id"] == adas
    assert [each["task_id"] for each in site.get("/tasks", "ada").json["tasks"]] == [adas]
    assert site.get("/tasks", "bob").json == {"tasks": []}
    assert site.get("/tasks", "celeriac:system").status_code == 403
    assert site.send("POST", "/work", "celeriac:system").status_code == 403


ASKED = [
    ("GET", "/tasks/{waits}", {}),
    ("GET", "/tasks/{ended}", {}),
    ("GET", "/tasks/{ended}?wait=5", {}),
    ("GET", "/tasks/{failed}", {}),
    ("GET", "/tasks/unknown", {}),
    ("GET", "/tasks/{ended}", {"If-None-Match": '"1"'}),
    ("GET", "/tasks/{ended}?wait=-1", {}),
    ("GET", "/tasks/{ended}?wait=x", {}),
    ("GET", "/tasks/%01", {}),
    ("GET", "/tasks", {}),
    ("GET", "/tasks?limit=2", {}),
    ("GET", "/tasks?limit=0", {}),
    ("GET", "/tasks?before=x", {}),
    ("GET", "/tasks/{ended}/events", {"Last-Event-ID": "1"}),
    ("GET", "/tasks/{ended}/events", {"Last-Event-ID": "x"}),
    ("GET", "/tasks/unknown/events", {}),
    ("GET", "/celeriac/client.js", {}),
    ("POST", "/tasks/{ended}/retry", {}),
    ("POST", "/tasks/unknown/retry", {}),
    ("DELETE", "/tasks/unknown", {}),
    ("DELETE", "/tasks/{ended}", {}),
]


def answer_of(code: int, headers: Mapping[str, str], body: bytes) -> Any:
    """What has to be the same, whatever the framework."""
    kind = headers.get("content-type", "").partition(";")[0] if body else ""
    told: Any = json.loads(body) if kind == "application/json" else body
    names = ("etag", "retry-after", "access-control-allow-origin")
    found = {name: headers[name] for name in names if name in headers}
    if kind == "text/javascript" and "etag" in found:
        found["etag"] = "the file's"
    if code == 422:  # of a union FastAPI tells each part
        told = {tuple(each["loc"][:2]) for each in told["detail"]}
    return code, kind, found, told


def test_both_frameworks_give_the_same_answers(site: Site) -> None:
    ids = {
        name: site.send("POST", "/work", "ada").json["task_id"]
        for name in ("waits", "ended", "failed")
    }
    site.celery.backend.store_result(ids["ended"], {"x": [1, None]}, "SUCCESS")
    site.celery.backend.store_result(ids["failed"], ValueError("a secret"), "FAILURE")

    async def ask_fastapi() -> list[Any]:
        async with serve(site.celery) as web:
            answers = []
            for method, path, more in ASKED:
                headers = {"X-User": "ada", **more}
                asked = await web.http.request(method, path.format(**ids), headers=headers)
                answers.append(answer_of(asked.status_code, asked.headers, asked.content))
            return answers

    theirs = asyncio.run(ask_fastapi())
    for (method, path, more), answer in zip(ASKED, theirs, strict=True):
        asked = site.send(method, path.format(**ids), "ada", **more)
        headers = {name.lower(): value for name, value in asked.headers.items()}
        assert answer_of(asked.status_code, headers, asked.data) == answer, path
        asked.close()
    assert site.send("DELETE", f"/tasks/{ids['waits']}", "ada").json["state"] == "REVOKED"


def test_bad_input_is_answered_in_fastapis_words(site: Site) -> None:
    for path, where in [
        ("/tasks/x?wait=-1", ["query", "wait"]),
        ("/tasks/x?wait=inf", ["query", "wait"]),
        ("/tasks?limit=0", ["query", "limit"]),
        ("/tasks?before=x", ["query", "before"]),
        ("/tasks/%01", ["path", "task_id"]),
        (f"/tasks/{'x' * 256}", ["path", "task_id"]),
    ]:
        answer = site.get(path, "ada")
        expected = 404 if where == ["query", "wait"] else 422  # whose task comes first
        assert answer.status_code == expected, path
        if expected == 422:
            assert answer.json["detail"][0]["loc"] == where
    adas = site.send("POST", "/work", "ada").json["task_id"]
    assert site.get(f"/tasks/{adas}?wait=-1", "ada").json["detail"][0]["loc"] == ["query", "wait"]
    bad = site.get(f"/tasks/{adas}/events", "ada", Last_Event_ID="x")
    assert bad.json["detail"][0]["loc"] == ["header", "last-event-id"]


def test_a_stored_failure_is_an_answer_and_tells_nothing_of_the_arguments(site: Site) -> None:
    @site.celery.task(shared=False)
    def leak() -> None:
        raise ValueError("a secret")

    task_id = str(leak.apply().id)
    answer = site.get(f"/tasks/{task_id}?token={TOKENS.of_task(task_id)}")
    assert (answer.status_code, answer.json["state"]) == (200, "FAILURE")
    assert answer.json["error"] == "the task failed: ValueError"
    assert "secret" not in answer.text


def test_streams_are_counted_until_they_are_closed(site: Site) -> None:
    adas = site.send("POST", "/work", "ada").json["task_id"]
    path = f"/tasks/{adas}/events"
    open_ones = [site.get(path, "ada") for _ in range(2)]
    assert [each.status_code for each in open_ones] == [200, 200]
    refused = site.get(path, "ada")
    assert (refused.status_code, refused.json["detail"][:9]) == (429, "2 streams")
    assert site.get(f"/tasks/{adas}?wait=1", "ada").status_code == 429
    open_ones[0].close()
    first = site.get(path, "ada")
    assert first.status_code == 200
    first.close()
    open_ones[1].close()
    Celeriac.stop(site.app)
    stopped = site.get(path, "ada")
    assert b"".join(stopped.response) == b""
    stopped.close()


def test_a_thousand_who_ask_while_the_broker_pauses_are_answered(tmp_path: Path) -> None:
    """From the status store, which does not pause, or 503; and sending is 503 in its deadline."""
    with Valkey(tmp_path / "broker") as broker, Valkey(tmp_path / "store") as store:
        site = Site(broker.celery_url, result_backend=store.celery_url)
        try:
            known = site.send("POST", "/work", "ada").json["task_id"]
            assert site.get(f"/tasks/{known}", "ada").status_code == 200
            assert broker.process is not None

            def ask(number: int) -> int:
                sends = number % 100 == 0
                answer = site.send("POST", "/work") if sends else site.get(f"/tasks/{known}", "ada")
                return int(answer.status_code)

            os.kill(broker.process.pid, signal.SIGSTOP)
            try:
                before = time.monotonic()
                with ThreadPoolExecutor(100) as threads:
                    codes = list(threads.map(ask, range(1000)))
                took = time.monotonic() - before
            finally:
                os.kill(broker.process.pid, signal.SIGCONT)
            assert codes.count(200) == 990
            assert codes.count(503) == 10
            assert took < 60
        finally:
            site.close()
            bridge.close()


def test_the_reference_systems_tasks_run_here_without_change(
    redis_server: str, tmp_path: Path
) -> None:
    from project.users.tasks import divide

    site = Site(redis_server, task_always_eager=True)
    with site.app.app_context():
        assert divide.delay(1, 2).get() == 0.5
        assert divide.app is site.celery
    site.close()


def test_what_a_flask_sqlalchemy_session_commits_is_sent(redis_server: str, tmp_path: Path) -> None:
    class Base(DeclarativeBase):
        pass

    db = SQLAlchemy(model_class=Base)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(Integer, primary_key=True)
        text: Mapped[str] = mapped_column(String(100))

    site = Site(redis_server)
    site.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'db.sqlite3'}"
    db.init_app(site.app)

    @site.celery.task(shared=False)
    def index(note_id: int) -> None: ...

    @site.app.post("/notes/<how>")
    def add(how: str) -> Any:
        note = Note(text=how)
        db.session.add(note)
        db.session.flush()
        sent = index.delay_on_commit(db.session, note.id)
        if how == "roll back":
            db.session.rollback()
        elif how == "fail":
            raise ValueError(how)
        else:
            db.session.commit()
        return {"task_id": sent.id}

    outbox = outbox_table(Base.metadata)

    def is_empty() -> bool:
        with site.app.app_context():
            return not db.session.scalars(select(outbox.c.id)).all()

    with site.app.app_context():
        db.create_all()
    site.app.testing = False
    database = Database(site.app.config["SQLALCHEMY_DATABASE_URI"])
    for with_outbox in (False, True):
        if with_outbox:
            use_outbox(site.celery, database)
        sent = site.send("POST", "/notes/commit", "ada").json["task_id"]
        assert site.get(f"/tasks/{sent}", "ada").json["state"] == "PENDING"
        assert site.get(f"/tasks/{sent}", "ada").json["task"].endswith("index")
        undone = site.send("POST", "/notes/roll%20back", "ada").json["task_id"]
        assert site.get(f"/tasks/{undone}", "ada").status_code == 404
        assert site.send("POST", "/notes/fail", "ada").status_code == 500
        assert waiting(redis_server, "celery") == [sent]
    eventually(is_empty)  # what was sent is removed in the background
    bridge.run(database.adispose())
    with site.app.app_context():
        db.engine.dispose()
    site.close()
    bridge.close()
