"""Who may see, follow and end which tasks over HTTP, SSE and WebSocket, and from which pages."""

import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from celery import Celery
from fastapi import Depends, FastAPI
from itsdangerous import TimestampSigner
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from celeriac import adopt, records
from celeriac.fastapi import PUBLIC, ReadTokens, SameOriginMiddleware, owned_by, public
from support import close_results
from web import TOKENS, Web, serve

pytestmark = pytest.mark.anyio

ELSEWHERE = Origin("https://elsewhere.example")
ADA = {"X-User": "ada"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def celery(redis_server: str) -> Iterator[Celery]:
    app = Celery("access", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


async def code_of(web: Web, path: str, who: str = "", say: str = "", **options: Any) -> int | None:
    """With which code a socket is closed; None if a task is told over it instead."""
    async with web.socket(path, who, **options) as socket:
        try:
            if say:
                await socket.send(say)
            assert json.loads(await socket.recv()).get("state") == "PENDING"
        except ConnectionClosed:
            return socket.close_code
    return None


async def test_a_token_reads_and_does_nothing_else(celery: Celery) -> None:
    async with serve(celery) as web:
        task_id = await web.publish("ada")
        for token in (TOKENS.of_task(task_id), TOKENS.of_owner("ada")):
            query = {"token": token}
            assert (await web.http.get(f"/tasks/{task_id}", params=query)).status_code == 200
            assert (await web.http.delete(f"/tasks/{task_id}", params=query)).status_code == 404
            retried = await web.http.post(f"/tasks/{task_id}/retry", params=query)
            assert retried.status_code == 404
            assert (await web.http.get("/tasks", params=query)).json()["tasks"] == []
        seen = await web.http.get(f"/tasks/{task_id}", headers=ADA)
        assert seen.json()["state"] == "PENDING"


@pytest.mark.parametrize("socket", ["one", "many"])
async def test_another_sites_page_needs_a_token_that_is_valid(celery: Celery, socket: str) -> None:
    late = ReadTokens("0123456789abcdef", seconds=-1)
    async with serve(celery) as web:
        adas, bobs = await web.publish("ada"), await web.publish("bob")

        def told_to(token: str | None, task_id: str) -> dict[str, Any]:
            query = "" if token is None else f"?token={token}"
            if socket == "one":
                return {"path": f"/ws/task_status/{task_id}{query}"}
            return {"path": f"/ws/tasks{query}", "say": json.dumps({"follow": task_id})}

        for token in (None, "", "x", TOKENS.of_task(adas)[:-1] + "!"):
            with pytest.raises(InvalidStatus, match="403"):
                await code_of(web, who="ada", origin=ELSEWHERE, **told_to(token, adas))
        token = TOKENS.of_task(adas)
        assert await code_of(web, origin=ELSEWHERE, **told_to(token, adas)) is None
        # What a browser sends by itself adds nothing to it.
        refused = {"who": "bob", "origin": ELSEWHERE, **told_to(token, bobs)}
        if socket == "one":
            assert await code_of(web, **refused) == 4404
        else:
            with pytest.raises(AssertionError):
                await code_of(web, **refused)
        assert await code_of(web, who="ada", **told_to(None, adas)) is None  # no browser's
    async with serve(celery, tokens=late) as web:
        with pytest.raises(InvalidStatus, match="403"):
            await code_of(web, who="ada", origin=ELSEWHERE, **told_to(late.of_task(adas), adas))
    async with serve(celery, tokens=None) as web:
        with pytest.raises(InvalidStatus, match="403"):
            await code_of(web, who="ada", origin=ELSEWHERE, **told_to(token, adas))
    async with serve(celery, origins=[str(ELSEWHERE)]) as web:
        assert await code_of(web, who="ada", origin=ELSEWHERE, **told_to(None, adas)) is None


async def test_the_middleware_leaves_the_sockets_of_token_holders_to_their_routes(
    celery: Celery,
) -> None:
    for options, refused in (({}, True), ({"except_sockets": ["/ws/task"]}, False)):
        guard = Middleware(SameOriginMiddleware, **options)
        async with serve(celery, middleware=[guard]) as web:
            task_id = await web.publish("ada")
            path = f"/ws/task_status/{task_id}"
            with pytest.raises(InvalidStatus, match="403"):
                await code_of(web, path, "ada", origin=ELSEWHERE)
            with_token = f"{path}?token={TOKENS.of_task(task_id)}"
            if refused:
                with pytest.raises(InvalidStatus, match="403"):
                    await code_of(web, with_token, origin=ELSEWHERE)
            else:
                assert await code_of(web, with_token, origin=ELSEWHERE) is None
            posted = await web.http.post("/work", headers={"Origin": str(ELSEWHERE)})
            assert posted.status_code == 403


async def test_any_page_may_read_what_a_token_says_and_nothing_else(celery: Celery) -> None:
    async with serve(celery) as web:
        task_id = await web.publish("ada")
        token = TOKENS.of_task(task_id)

        async def open_to(path: str, token: str | None) -> tuple[int, str | None]:
            query = {"wait": "0.05"} | ({} if token is None else {"token": token})
            async with web.http.stream("GET", path, params=query, headers=ADA) as answer:
                return answer.status_code, answer.headers.get("access-control-allow-origin")

        for path in (f"/tasks/{task_id}", f"/tasks/{task_id}/events"):
            assert await open_to(path, token) == (200, "*")
            assert await open_to(path, "x") == (404, "*")  # though the cookie may see it
            assert await open_to(path, None) == (200, None)
        assert await open_to("/tasks/unknown", token) == (404, "*")
        assert await open_to("/tasks", token) == (200, None)
        assert await open_to("/celeriac/client.js", None) == (200, "*")
        same = await web.http.get(
            f"/tasks/{task_id}", params={"token": token}, headers={"If-None-Match": '"0"'}
        )
        assert same.status_code == 304
        assert same.headers["access-control-allow-origin"] == "*"
        asked = await web.http.options(f"/tasks/{task_id}")
        assert asked.headers["access-control-allow-headers"] == "If-None-Match"
        assert "access-control-allow-credentials" not in asked.headers
        assert "access-control-allow-methods" not in asked.headers
    async with serve(celery, tokens=None) as web:
        assert await open_to(f"/tasks/{task_id}", token) == (200, None)
        assert (await web.http.options(f"/tasks/{task_id}")).status_code == 405


async def test_no_name_is_another_ones_or_everybodys(celery: Celery) -> None:
    """Whatever a policy reads from what users say."""
    async with serve(celery) as web:
        adas, beats = await web.publish("ada"), await web.publish(records.SYSTEM)
        for name in ("*", "public", "Public.PUBLIC", "system"):
            who = {"X-User": name}
            for task_id in (adas, beats):
                assert (await web.http.get(f"/tasks/{task_id}", headers=who)).status_code == 404
            own = (await web.http.post("/work", headers=who)).json()["task_id"]
            assert (await web.http.get(f"/tasks/{own}")).status_code == 404
            (listed,) = (await web.http.get("/tasks", headers=who)).json()["tasks"]
            assert listed["task_id"] == own
        who = {"X-User": records.SYSTEM}
        for method, path in (
            ("GET", f"/tasks/{beats}"),
            ("DELETE", f"/tasks/{beats}"),
            ("GET", f"/tasks/{beats}/events"),
            ("GET", "/tasks"),
            ("POST", "/work"),
        ):
            answer = await web.http.request(method, path, headers=who)
            assert (answer.status_code, "nobody may be called" in answer.text) == (403, True), path
        with pytest.raises(InvalidStatus, match="403"):
            await code_of(web, f"/ws/task_status/{beats}", records.SYSTEM)


async def test_a_cookie_that_was_forged_shows_nothing(celery: Celery) -> None:
    async def visitor(connection: HTTPConnection) -> str:
        return str(connection.session.get("visitor", ""))

    def cookie(secret: str, visitor: str = "ada") -> str:
        payload = b64encode(json.dumps({"visitor": visitor}).encode())
        return TimestampSigner(secret).sign(payload).decode()

    session = Middleware(SessionMiddleware, secret_key="right")
    async with serve(celery, owner=visitor, middleware=[session]) as web:
        task_id = await web.publish("ada")
        changed = cookie("right").split(".")[0] + "." + cookie("right", "bob").split(".", 1)[1]
        path = f"/ws/task_status/{task_id}"
        for value, code in ((cookie("right"), 200), (cookie("wrong"), 404), (changed, 404)):
            headers = {"Cookie": f"session={value}"}
            for read in (f"/tasks/{task_id}?wait=0.01", f"/tasks/{task_id}/events"):
                web.http.cookies.clear()  # what the server sent for this one
                async with web.http.stream("GET", read, headers=headers) as answer:
                    assert answer.status_code == code
            closed = await code_of(web, path, headers=headers)
            assert closed == (None if code == 200 else 4404)
        web.http.cookies.clear()
        assert (await web.http.delete(f"/tasks/{task_id}", headers=headers)).status_code == 404


async def test_an_owner_is_one_requests_own() -> None:
    """Also where every request runs in one context, as in tests without a server."""
    app = FastAPI()

    async def ada() -> str:
        return "ada"

    @app.get("/owned", dependencies=[Depends(owned_by(ada))])
    async def owned() -> str:
        return records.current_owner()

    @app.get("/nobodys")
    async def nobodys() -> str:
        return records.current_owner()

    @app.get("/public", dependencies=[Depends(owned_by(public))])
    async def to_all() -> str:
        return records.current_owner()

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path, owner in (
            ("/owned", "ada"),
            ("/nobodys", ""),
            ("/owned", "ada"),
            ("/public", ""),
        ):
            assert (await http.get(path)).json() == owner


async def test_strangers_and_holders_of_tokens_do_not_lock_each_other_out(celery: Celery) -> None:
    async with serve(celery, streams=1, unowned=True) as web:
        adas, bobs, nobodys = [await web.publish(who) for who in ("ada", "bob", "")]
        path = f"/ws/task_status/{nobodys}"
        async with web.socket("/ws/tasks") as idle:
            assert await code_of(web, path) == 4429
            assert await code_of(web, f"/ws/task_status/{adas}?token=x") == 4429  # a stranger's
            for task_id in (adas, bobs):
                token = TOKENS.of_task(task_id)
                assert await code_of(web, f"/ws/task_status/{task_id}?token={token}") is None
            assert await code_of(web, f"/ws/task_status/{adas}", "ada") is None
            await idle.send("{}")


async def test_what_is_public_has_a_limit_for_each_address(celery: Celery) -> None:
    async def from_header(connection: HTTPConnection) -> Any:
        connection.scope["client"] = connection.headers.get("x-address", "local"), 1
        return PUBLIC

    async with serve(celery, streams=1, owner=from_header) as web:
        path = f"/ws/task_status/{await web.publish('ada')}"
        async with web.socket(path) as one:
            await one.recv()
            assert await code_of(web, path) == 4429
            assert (await web.http.get(f"/tasks/{path[16:]}/events")).status_code == 429
            assert await code_of(web, path, headers={"X-Address": "other"}) is None
