"""What is told to those who wait: long polls, quiet streams, tasks that no worker takes."""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from celery import Celery, states

from celeriac import adopt
from celeriac.errors import PublishError, ServiceError
from celeriac.fastapi import public
from celeriac.status import Reader
from support import close_results, free_port, python
from web import serve, states_in

pytestmark = pytest.mark.anyio

NO_WORKER = "no worker listens on queue 'lonely'"
MAIN = """
from celery import Celery
from fastapi import FastAPI
import celeriac
from celeriac.fastapi import attach, public, status_router

celery = celeriac.adopt(Celery("main", broker={url!r}, backend={url!r}))
app = FastAPI()
attach(app, celery)
app.include_router(status_router(celery, owner=public))
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def celery(redis_server: str) -> Iterator[Celery]:
    app = Celery("waiting", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


async def test_a_task_that_no_worker_takes_says_so_in_every_way_and_goes_on(celery: Celery) -> None:
    """A quiet task ends no stream either, though there may be nothing to tell for long."""
    async with serve(celery, owner=public) as web:
        begun = time.monotonic()
        task_id = await web.publish("", queue="lonely")
        path, one = f"/tasks/{task_id}", f"/ws/task_status/{task_id}"
        nothing_new = {"If-None-Match": '"0"'}
        async with (
            asyncio.timeout(20),
            web.socket(one) as fresh,
            web.socket(f"{one}?after=0") as resumed,
            web.socket("/ws/tasks") as many,
            web.http.stream("GET", f"{path}/events") as streamed,
            asyncio.TaskGroup() as polling,
        ):
            await many.send(json.dumps({"follow": task_id, "after": 0}))
            asked = polling.create_task(web.http.get(f"{path}?wait=20", headers=nothing_new))
            lines = (line async for line in streamed.aiter_lines() if line.startswith("data: "))
            assert "waiting" not in json.loads(await fresh.recv())
            assert "waiting" not in json.loads((await anext(lines))[6:])
            hints = [json.loads(await each.recv()) for each in (fresh, resumed, many)]
            hints += [json.loads((await anext(lines))[6:]), (answer := await asked).json()]
            assert [(hint["state"], hint["waiting"]) for hint in hints] == [
                ("PENDING", NO_WORKER)
            ] * 5
            tag = answer.headers["etag"]
            assert tag != '"0"'
            same = await web.http.get(f"{path}?wait=0.2", headers={"If-None-Match": tag})
            assert same.status_code == 304
            asked = polling.create_task(
                web.http.get(f"{path}?wait=20", headers={"If-None-Match": tag})
            )
            await asyncio.sleep(begun + 6 - time.monotonic())
            await web.store(task_id, 1, states.SUCCESS)
            ends = [json.loads(await each.recv()) for each in (fresh, resumed, many)]
            ends += [json.loads((await anext(lines))[6:]), (await asked).json()]
            assert states_in(ends) == ["SUCCESS"] * 5


@pytest.mark.parametrize("header", ['W/"0"', '"7", W/"0"', '"7","0"'])
async def test_a_long_poll_knows_a_tag_however_it_is_written(celery: Celery, header: str) -> None:
    """A proxy that compresses an answer makes its tag a weak one."""
    async with serve(celery, owner=public) as web:
        path, headers = f"/tasks/{await web.publish('')}", {"If-None-Match": header}
        assert (await web.http.get(path, headers=headers)).status_code == 304
        begun = time.monotonic()
        assert (await web.http.get(f"{path}?wait=0.5", headers=headers)).status_code == 304
        assert time.monotonic() - begun > 0.4
        other = await web.http.get(f"{path}?wait=5", headers={"If-None-Match": '"7"'})
        assert other.json()["state"] == "PENDING"


async def test_a_server_that_stops_ends_what_waits(
    celery: Celery, redis_server: str, tmp_path: Path
) -> None:
    """Without any option of the server's."""
    task_id = (await asyncio.to_thread(celery.send_task, "t")).id
    (tmp_path / "main.py").write_text(MAIN.format(url=redis_server))
    port = free_port()
    server = python("-m", "uvicorn", "main:app", "--port", str(port), cwd=tmp_path)
    with server:
        await asyncio.to_thread(server.wait_for, "Uvicorn running")
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
            asyncio.TaskGroup() as polling,
            http.stream("GET", f"/tasks/{task_id}/events") as streamed,
        ):
            lines = streamed.aiter_lines()
            assert '"PENDING"' in await anext(lines)
            asked = polling.create_task(http.get(f"/tasks/{task_id}?wait=60"))
            await asyncio.sleep(0.3)
            begun = time.monotonic()
            server.signal(signal.SIGTERM)
            assert [
                line for line in [line async for line in lines] if line.startswith("data")
            ] == []
            assert (await asked).json()["state"] == "PENDING"
        await asyncio.to_thread(server.wait, 5)
        assert time.monotonic() - begun < 3
        assert "Traceback" not in server.output
        assert "Finished server process" in server.output


@pytest.mark.parametrize(
    ("make", "said"),  # the error: one that was raised holds the app of its test
    [
        (partial(ServiceError, "redis.internal is away"), "may run on"),
        (partial(PublishError, "silent", maybe_accepted=True), "may have been accepted"),
        (partial(PublishError, "refused"), "nothing was accepted"),
    ],
)
async def test_what_may_have_been_done_is_not_said_to_have_failed(
    celery: Celery, monkeypatch: pytest.MonkeyPatch, make: Callable[[], ServiceError], said: str
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise make()

    async with serve(celery, owner=public) as web:
        if isinstance(make(), PublishError):
            monkeypatch.setattr("celeriac.publish.aapply_async", fail)
            answer = await web.http.post("/work")
        else:
            task_id = await web.publish("")
            monkeypatch.setattr(Reader, "cancel", fail)
            answer = await web.http.delete(f"/tasks/{task_id}")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert said in answer.json()["detail"]
        assert "internal" not in answer.text
