import json

import httpx
import pytest
from fastapi.testclient import TestClient

from project.users.tasks import divide, nightly_report

USER = {"username": "ada", "email": "ada@example.com"}


def test_a_user_is_created_once(client: TestClient) -> None:
    created = client.post("/users/", json=USER)
    assert created.status_code == 201
    assert client.get("/users/").json() == [created.json()]
    assert client.post("/users/", json=USER).status_code == 409


def test_the_form_subscribes_and_its_task_can_be_followed(
    client: TestClient, mailing_list: list[httpx.Request]
) -> None:
    task_id = client.post("/users/form/", json=USER).json()["task_id"]
    assert json.loads(mailing_list[0].content) == {"email": USER["email"]}
    status = client.get("/users/task_status/", params={"task_id": task_id})
    assert status.json() == {"state": "SUCCESS"}
    with client.websocket_connect(f"/ws/task_status/{task_id}") as socket:
        assert socket.receive_json() == {
            "task_id": task_id,
            "state": "SUCCESS",
            "result": "ada@example.com is on the list",
        }


def test_a_task_is_a_function(client: TestClient) -> None:
    assert divide(1, 2) == 0.5
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)


def test_a_task_has_a_session_as_a_view_has(client: TestClient) -> None:
    for name, domain in (("ada", "a.org"), ("bob", "b.org"), ("eve", "b.org")):
        client.post("/users/", json={"username": name, "email": f"{name}@{domain}"})
    report = nightly_report.delay().get()
    assert report == {"users": 3, "domains": {"a.org": 1, "b.org": 2}}


def test_a_page_is_served_to_a_browser(client: TestClient) -> None:
    page = client.get("/users/form/", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_user_and_its_task_come_together(
    client: TestClient, mailing_list: list[httpx.Request]
) -> None:
    answer = client.post("/users/user_subscribe/", json=USER)
    assert answer.status_code == 202
    assert json.loads(mailing_list[0].content) == {"email": USER["email"]}
    found = client.get("/users/task_status/", params=answer.json())
    assert found.json() == {"state": "SUCCESS"}


def test_without_the_user_there_is_no_task(
    client: TestClient, mailing_list: list[httpx.Request]
) -> None:
    client.post("/users/", json=USER)
    assert client.post("/users/user_subscribe/", json=USER).status_code == 409
    assert mailing_list == []
