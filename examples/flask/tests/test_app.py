"""The application in one process: its tasks run where they are sent."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from celeriac import bridge
from celeriac.embedded import Valkey
from celeriac.flask import FileConfig
from server.core import create_app
from support import close_results


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Flask]:
    urls = {"broker_url": valkey.celery_url, "result_backend": valkey.celery_url}
    celery = urls | {"task_always_eager": True}
    made = create_app(
        FileConfig.model_validate({"port": 5000, "secret_key": "a secret", "celery": celery})
    )
    yield made
    close_results(made.extensions["celery"].backend)
    bridge.close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def test_the_index(client: FlaskClient) -> None:
    assert client.get("/").json == {"status": "success"}


def test_a_task_and_its_result(client: FlaskClient) -> None:
    started = client.post("/task/", json={"seconds": 0})
    assert started.status_code == 202
    answer = client.get(f"/task/{started.json['task_id']}").json  # type: ignore[index]
    assert answer is not None
    assert answer["state"] == "SUCCESS"
    assert datetime.fromisoformat(answer["result"]).tzinfo is not None


def test_a_task_that_fails_says_why(client: FlaskClient) -> None:
    started = client.post("/task/", json={"seconds": 61})
    answer = client.get(f"/task/{started.json['task_id']}")  # type: ignore[index]
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["error"] == "seconds: expected 0 to 60, got 61"


def test_a_task_has_the_applications_own_configuration(app: Flask, client: FlaskClient) -> None:
    app.config["LONGEST_TASK"] = -1
    started = client.post("/task/", json={"seconds": 0})
    answer = client.get(f"/task/{started.json['task_id']}").json  # type: ignore[index]
    assert answer is not None
    assert answer["state"] == "FAILURE"


def test_the_example_of_the_configuration_file_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from celeriac.flask import read_config

    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    file = Path(__file__).parent.parent / "secrets" / "api-config.example.yaml"
    assert read_config(file).port == 5000
