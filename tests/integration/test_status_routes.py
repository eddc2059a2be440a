"""What is told of tasks over HTTP, SSE and WebSocket, and to whom: a real server and Redis."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from celery import Celery, states
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from celeriac import adopt, dead, records
from celeriac.errors import PublicError
from celeriac.fastapi import ReadTokens, public
from support import close_results, free_port
from web import TOKENS, Web, frames, serve, states_in

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def celery(redis_server: str) -> Iterator[Celery]:
    app = Celery("routes", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


async def sse(web: Web, path: str, **headers: str) -> list[tuple[int, dict[str, Any]]]:
    """Events of a stream that ends: their ids and data."""
    answer = await web.http.get(path, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((int(lines["id"]), json.loads(lines["data"])))
    return found


async def test_a_task_is_read_waited_for_and_followed(celery: Celery) -> None:
    async with serve(celery) as web:
        task_id = await web.publish("ada", queue="q")
        ada = {"X-User": "ada"}
        first = await web.http.get(f"/tasks/{task_id}", headers=ada)
        shown = first.json()
        assert (shown["state"], shown["id"], shown["task"], shown["queue"]) == (
            "PENDING",
            0,
            "work",
            "q",
        )
        assert first.headers["etag"] == '"0"'
        same = await web.http.get(f"/tasks/{task_id}", headers=ada | {"If-None-Match": '"0"'})
        assert (same.status_code, same.content) == (304, b"")
        # Until it changes, until it ends, and no longer than asked.
        changed = asyncio.create_task(
            web.http.get(f"/tasks/{task_id}?wait=10", headers=ada | {"If-None-Match": '"0"'})
        )
        ended = asyncio.create_task(web.http.get(f"/tasks/{task_id}?wait=10", headers=ada))
        short = await web.http.get(f"/tasks/{task_id}?wait=0.05", headers=ada)
        assert short.json()["state"] == "PENDING"
        streamed = asyncio.create_task(sse(web, f"/tasks/{task_id}/events", **ada))
        async with web.socket(f"/ws/task_status/{task_id}", "ada") as socket:
            assert json.loads(await socket.recv())["state"] == "PENDING"
            await web.store(task_id, None, states.STARTED)
            assert (await changed).json()["state"] == "STARTED"
            await web.store(task_id, {"current": 1}, "PROGRESS")
            await web.store(task_id, [1], states.SUCCESS)
            assert states_in(await frames(socket)) == ["STARTED", "PROGRESS", "SUCCESS"]
            assert socket.close_code == 1000
        assert (await ended).json()["result"] == [1]
        seen = [(number, event["state"]) for number, event in await streamed]
        assert seen[-2:] == [(2, "PROGRESS"), (3, "SUCCESS")]
        # From where a client was.
        resumed = await sse(web, f"/tasks/{task_id}/events", **ada, **{"Last-Event-ID": "1"})
        assert [number for number, _ in resumed] == [2, 3]
        async with web.socket(f"/ws/task_status/{task_id}?after=2", "ada") as socket:
            assert [frame["id"] for frame in await frames(socket)] == [3]
        over = await web.http.get(f"/tasks/{task_id}/events", headers=ada | {"Last-Event-ID": "3"})
        assert over.status_code == 204


async def test_whoever_is_not_the_owner_is_told_what_an_unknown_id_is_told(celery: Celery) -> None:
    async with serve(celery) as web:
        task_id = await web.publish("ada")
        nobodys = await web.publish("")
        systems = await web.publish(records.SYSTEM)
        for path in ("/tasks/{}", "/tasks/{}/events", "/tasks/{}?wait=1"):
            answers = set()
            for who, each in (
                ("", task_id), ("bob", task_id), ("bob", "no-such-task"), ("", "no-such-task"),
                ("bob", nobodys), ("", nobodys), ("bob", systems), ("", systems),
            ):  # fmt: skip
                answer = await web.http.get(path.format(each), headers={"X-User": who})
                headers = {name for name in answer.headers if name != "date"}
                answers.add((answer.status_code, answer.content, frozenset(headers)))
            assert len(answers) == 1, path
            assert next(iter(answers))[0] == 404
        for method, path in (("DELETE", "/tasks/{}"), ("POST", "/tasks/{}/retry")):
            theirs = await web.http.request(method, path.format(task_id), headers={"X-User": "bob"})
            unknown = await web.http.request(method, path.format("no"), headers={"X-User": "bob"})
            assert (theirs.status_code, theirs.content) == (unknown.status_code, unknown.content)
            assert theirs.status_code == 404
        closed = set()
        for who, each in (("", task_id), ("bob", task_id), ("bob", "no-such-task")):
            async with web.socket(f"/ws/task_status/{each}", who) as socket:
                with pytest.raises(ConnectionClosed):
                    await socket.recv()
                closed.add((socket.close_code, socket.close_reason))
        assert closed == {(4404, "unknown task")}
        async with web.socket("/ws/tasks", "bob") as socket:
            for each in (task_id, "no-such-task"):
                await socket.send(json.dumps({"follow": each}))
                answer = json.loads(await socket.recv())
                assert answer == {"task_id": each, "error": "unknown task", "code": "unknown"}
        with pytest.raises(InvalidStatus, match="403"):
            async with web.socket(
                f"/ws/task_status/{task_id}", "ada", origin=Origin("https://evil.example")
            ):
                pass
        mine = await web.http.get("/tasks", headers={"X-User": "ada"})
        assert [each["task_id"] for each in mine.json()["tasks"]] == [task_id]
        for who in ("bob", ""):
            theirs = await web.http.get("/tasks", headers={"X-User": who})
            assert theirs.json() == {"tasks": []}
        assert (
            await web.http.get(f"/tasks/{task_id}", headers={"X-User": "ada"})
        ).status_code == 200


async def test_who_waits_for_a_worker_that_is_not_there_is_told_so(celery: Celery) -> None:
    async with serve(celery, owner=public) as web:
        task_id = await web.publish("", queue="nobody-listens")
        async with web.socket(f"/ws/task_status/{task_id}") as socket:
            assert "waiting" not in json.loads(await socket.recv())
            async with asyncio.timeout(10):
                hint = json.loads(await socket.recv())
            assert (hint["state"], hint["id"]) == ("PENDING", 0)
            assert hint["waiting"] == "no worker listens on queue 'nobody-listens'"
            answer = (await web.http.get(f"/tasks/{task_id}")).json()
            assert answer["waiting"] == hint["waiting"]
            await web.store(task_id, 1, states.SUCCESS)
            assert states_in(await frames(socket)) == ["SUCCESS"]


async def test_what_expires_ends_though_there_is_no_worker(celery: Celery) -> None:
    async with serve(celery, owner=public) as web:
        followed = await web.publish("", expires=1)
        asked = await web.publish("", expires=1)
        async with web.socket(f"/ws/task_status/{followed}") as socket:
            assert states_in(await frames(socket)) == ["PENDING", "REVOKED"]
        answer = (await web.http.get(f"/tasks/{asked}?wait=5")).json()
        assert (answer["state"], answer["error"]) == ("REVOKED", "TaskRevokedError: expired")


async def test_what_is_public_is_shown_to_all(celery: Celery) -> None:
    async with serve(celery, owner=public) as web:
        for owner in ("ada", ""):
            task_id = await web.publish(owner)
            assert (await web.http.get(f"/tasks/{task_id}")).json()["state"] == "PENDING"
        assert (await web.http.get("/tasks/no-such-task")).status_code == 404


async def test_what_is_nobodys_is_shown_to_all_where_that_is_wanted(celery: Celery) -> None:
    async with serve(celery, unowned=True) as web:
        nobodys, adas = await web.publish(""), await web.publish("ada")
        assert (await web.http.get(f"/tasks/{nobodys}")).status_code == 200
        assert (await web.http.get(f"/tasks/{adas}")).status_code == 404


async def test_only_what_was_written_for_the_public_is_shown_of_an_error(celery: Celery) -> None:
    for errors, shown in ((False, "the task failed: ValueError"), (True, "ValueError: secret 5")):
        async with serve(celery, owner=public, errors=errors) as web:
            failed, told = await web.publish(""), await web.publish("")
            await web.store(failed, ValueError("secret 5"), states.FAILURE)
            await web.store(told, PublicError("too_large", "Too large."), states.FAILURE)
            answer = (await web.http.get(f"/tasks/{failed}")).json()
            assert (answer["error"], answer["code"]) == (shown, "ValueError")
            async with web.socket(f"/ws/task_status/{failed}") as socket:
                assert (await frames(socket))[-1]["error"] == shown
            answer = (await web.http.get(f"/tasks/{told}")).json()
            assert (answer["error"], answer["code"]) == ("Too large.", "too_large")


async def test_a_task_is_cancelled_and_only_a_dead_letter_is_sent_again(celery: Celery) -> None:
    async with serve(celery) as web:
        ada = {"X-User": "ada"}
        task_id = await web.publish("ada")
        assert (await web.http.post(f"/tasks/{task_id}/retry", headers=ada)).status_code == 409
        for _ in range(2):
            answer = await web.http.delete(f"/tasks/{task_id}", headers=ada)
            assert (answer.status_code, answer.json()["state"]) == (202, "REVOKED")
        assert (await web.http.post(f"/tasks/{task_id}/retry", headers=ada)).status_code == 409
        headers = {"id": task_id, "task": "work", records.OWNER: "ada", "retries": 0}
        message: Any = type("Message", (), {})()
        message.headers, message.body = headers, "[[], {}, {}]"
        message.content_type, message.content_encoding = "application/json", "utf-8"
        message.properties = {"correlation_id": task_id}
        message.delivery_info = {"exchange": "", "routing_key": "celery"}
        with dead.letters(celery) as letters:
            letters.bury(headers, dead.message_of(message), "poison", "celery")
        again = await web.http.post(f"/tasks/{task_id}/retry", headers=ada)
        assert again.status_code == 202, again.text
        new = again.json()
        assert new["state"] == "PENDING"
        assert new["task_id"] != task_id
        assert (await web.http.get(f"/tasks/{new['task_id']}", headers=ada)).status_code == 200
        assert (await web.http.get(f"/tasks/{task_id}", headers=ada)).json()["state"] == "REVOKED"
        assert (await web.http.post(f"/tasks/{task_id}/retry", headers=ada)).status_code == 409


async def test_an_owners_tasks_come_in_pages_the_newest_first(celery: Celery) -> None:
    async with serve(celery) as web:
        ids = [await web.publish("ada") for _ in range(25)]
        seen: list[str] = []
        before = ""
        while True:
            page = await web.http.get(f"/tasks?limit=10{before}", headers={"X-User": "ada"})
            seen += [each["task_id"] for each in page.json()["tasks"]]
            if "next" not in page.json():
                break
            before = f"&before={page.json()['next']}"
        assert seen == ids[::-1]
        # None of these is the place of an entry in Redis.
        for wrong in ("0-0", "1", "x", "1-99999999999999999999", "\u0661-1", "1-1\n"):
            answer = await web.http.get("/tasks", params={"before": wrong})
            assert answer.status_code == 422, wrong


async def test_a_token_lets_in_where_it_says_and_not_for_long(celery: Celery) -> None:
    async with serve(celery) as web:
        adas, bobs = await web.publish("ada"), await web.publish("bob")
        for token, allowed in (
            (TOKENS.of_task(adas), {adas}),
            (TOKENS.of_owner("bob"), {bobs}),
            (TOKENS.of_owner(""), set()),
            (TOKENS.of_owner("*"), set()),
            (TOKENS.of_task(adas)[:-1] + "!", set()),
            (ReadTokens("another secret...").of_task(adas), set()),
            ("x", set()),
        ):
            for task_id in (adas, bobs):
                answer = await web.http.get(f"/tasks/{task_id}", params={"token": token})
                assert (answer.status_code == 200) is (task_id in allowed)
        with pytest.raises(ValueError, match="at least 16 characters"):
            ReadTokens("short")
        path = f"/ws/task_status/{adas}?token={TOKENS.of_task(adas)}"
        async with web.socket(path, origin=Origin("https://elsewhere.example")) as socket:
            assert json.loads(await socket.recv())["state"] == "PENDING"
    late = ReadTokens("0123456789abcdef", seconds=-1)
    async with serve(celery, tokens=late) as web:
        answer = await web.http.get(f"/tasks/{adas}", params={"token": late.of_task(adas)})
        assert answer.status_code == 404


async def test_one_socket_follows_many_tasks(celery: Celery) -> None:
    async with serve(celery) as web:
        ids = [await web.publish("ada") for _ in range(20)]
        async with web.socket("/ws/tasks", "ada") as socket:
            for task_id in ids:
                await socket.send(json.dumps({"follow": task_id}))
            firsts = [json.loads(await socket.recv()) for _ in ids]
            assert {each["task_id"] for each in firsts} == set(ids)
            await socket.send(json.dumps({"unfollow": ids[0]}))
            await socket.send(json.dumps({"follow": ids[1], "after": 0}))  # anew
            for task_id in ids[1:]:
                await web.store(task_id, 1, states.SUCCESS)
            lasts = [json.loads(await socket.recv()) for _ in ids[1:]]
            assert {each["task_id"] for each in lasts} == set(ids[1:])
            assert {each["state"] for each in lasts} == {"SUCCESS"}


async def test_an_owner_has_so_many_streams_and_no_more(celery: Celery) -> None:
    async with serve(celery, streams=2) as web:
        task_id = await web.publish("ada")
        path = f"/ws/task_status/{task_id}"
        async with web.socket(path, "ada") as one, web.socket(path, "ada") as two:
            await one.recv()
            await two.recv()
            async with web.socket(path, "ada") as three:
                with pytest.raises(ConnectionClosed):
                    await three.recv()
                assert three.close_code == 4429
            answer = await web.http.get(f"/tasks/{task_id}/events", headers={"X-User": "ada"})
            assert answer.status_code == 429
        async with asyncio.timeout(5):
            while True:  # the server hears of it a moment later
                async with web.socket(path, "ada") as again:
                    try:
                        assert json.loads(await again.recv())["state"] == "PENDING"
                        break
                    except ConnectionClosed:
                        await asyncio.sleep(0.01)


async def test_one_key_is_one_task_however_often_it_comes(celery: Celery) -> None:
    async with serve(celery) as web:
        headers = {"X-User": "ada", "Idempotency-Key": "k"}

        async def post(body: bytes = b"{}", **more: str) -> httpx.Response:
            return await web.http.post("/work", content=body, headers=headers | more)

        answers = await asyncio.gather(*(post() for _ in range(50)))
        assert {answer.status_code for answer in answers} == {202}
        (task_id,) = {answer.json()["task_id"] for answer in answers}
        used = await post(b"[]")
        assert used.status_code == 422
        assert used.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]
        others = await post(b"{}", **{"X-User": "bob"})
        assert others.json()["task_id"] != task_id
        without = await web.http.post("/work", headers={"X-User": "ada"})
        assert without.json()["task_id"] != task_id
        with celery.connection_for_read() as connection:
            assert connection.default_channel.queue_declare("celery").message_count == 3


async def test_a_broker_that_is_away_takes_no_key(redis_server: str) -> None:
    """Whoever tries again with the same key has the task sent."""
    port = free_port()
    app = Celery("away", broker=f"redis://127.0.0.1:{port}/0", backend=redis_server)
    adopt(app, publish_timeout=0.5)
    async with serve(app) as web:
        for _ in range(2):
            answer = await web.http.post("/work", headers={"Idempotency-Key": "k"})
            assert answer.status_code == 503
        assert answer.headers["retry-after"]
    close_results(app.backend)


async def test_the_browsers_side_is_served_as_a_module(celery: Celery) -> None:
    async with serve(celery) as web:
        answer = await web.http.get("/celeriac/client.js")
        assert answer.headers["content-type"].startswith("text/javascript")
        assert "export async function watchTask" in answer.text


async def test_the_api_is_documented(celery: Celery) -> None:
    async with serve(celery) as web:
        paths = (await web.http.get("/openapi.json")).json()["paths"]
        assert set(paths) >= {
            "/tasks", "/tasks/{task_id}", "/tasks/{task_id}/events", "/tasks/{task_id}/retry",
        }  # fmt: skip
        assert "404" in paths["/tasks/{task_id}"]["get"]["responses"]
