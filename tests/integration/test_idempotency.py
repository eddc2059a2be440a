"""`Idempotency-Key`: one key, one task, whatever becomes of the request that came first."""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, group
from redis import Redis

from celeriac import adopt, publish, records
from celeriac.errors import PublishError
from celeriac.fastapi import Idempotency
from celeriac.store import redis_url
from support import close_results

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def celery(redis_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    monkeypatch.setattr("celeriac.fastapi.idempotency._CLAIM", 1)
    app = Celery("once", broker=redis_server, backend=redis_server, set_as_current=False)
    app.conf.broker_pool_limit = 0  # no pool: nothing is left to close
    yield adopt(app)
    close_results(app.backend)


def request(celery: Celery, key: str = "k") -> Idempotency:
    """What a view is given for a request with this key."""
    asked: Any = SimpleNamespace(app=SimpleNamespace(celery=celery))
    return Idempotency(asked, key, "print")


def sent(celery: Celery) -> list[str]:
    """The ids of the messages in the queue, the first one first."""
    with Redis.from_url(redis_url(celery.conf.broker_url)) as client:
        messages: Any = client.lrange("celery", 0, -1)
    return [json.loads(each)["headers"]["id"] for each in reversed(messages)]


class Publishing:
    """`aapply_async`, of which the first call fails before its message is written, or after."""

    def __init__(self, error: BaseException, *, written: bool) -> None:
        self.error: BaseException | None = error
        self.written = written
        self.ids: list[str] = []
        self._publish = publish.aapply_async

    async def __call__(self, *args: Any, **options: Any) -> Any:
        self.ids.append(options["task_id"])
        if (error := self.error) is None:
            return await self._publish(*args, **options)
        self.error = None
        if self.written:
            await self._publish(*args, **options)
        raise error


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize(
    "fail",  # makes the error: one that was raised holds the app of its test
    [
        asyncio.CancelledError,  # the server stops, or a middleware heard that the client left
        partial(PublishError, "silent", maybe_accepted=True),
        partial(PublishError, "refused"),
    ],
    ids=["cancelled", "unsure", "refused"],
)
async def test_the_next_request_sends_the_same_task_if_none_was_sent(
    celery: Celery,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], BaseException],
    written: bool,
) -> None:
    error = fail()
    publishing = Publishing(error, written=written)
    monkeypatch.setattr("celeriac.publish.aapply_async", publishing)
    with pytest.raises(type(error)):
        await request(celery).send(celery.signature("work"))
    again = await request(celery).send(celery.signature("work"))
    last = await request(celery).send(celery.signature("work"))
    assert [again.id] == [last.id] == sent(celery)
    assert set(publishing.ids) == {again.id}
    assert len(publishing.ids) == (1 if written else 2)


async def test_where_nothing_proves_that_it_was_sent_it_is_one_id_at_least(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker is another server than the one that keeps the keys."""
    monkeypatch.setattr(records.book_of(celery), "with_message", False)
    publishing = Publishing(asyncio.CancelledError(), written=True)
    monkeypatch.setattr("celeriac.publish.aapply_async", publishing)
    with pytest.raises(asyncio.CancelledError):
        await request(celery).send(celery.signature("work"))
    again = await request(celery).send(celery.signature("work"))
    assert sent(celery) == [again.id, again.id]


async def test_a_task_that_was_sent_is_no_failure_because_nobody_could_note_it(
    celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = request(celery)
    run, calls = once._run, 0

    async def fail_second(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise PublishError("the status store is away")
        return await run(*arguments)

    monkeypatch.setattr(once, "_run", fail_second)
    first = await once.send(celery.signature("work"))
    assert calls == 2
    again = await request(celery).send(celery.signature("work"))
    assert [first.id] == [again.id] == sent(celery)


async def test_a_request_may_send_several_tasks(celery: Celery) -> None:
    async def view(names: list[str]) -> list[str]:
        once = request(celery)
        return [(await once.send(celery.signature(name))).id for name in names]

    ids = await view(["a", "b", "b"])
    assert len(set(ids)) == 3
    assert sent(celery) == ids
    assert await view(["b", "a", "b"]) == [ids[1], ids[0], ids[2]]  # its order may depend
    assert sent(celery) == ids


async def test_what_has_no_one_id_is_refused(celery: Celery) -> None:
    with pytest.raises(TypeError, match="got a group"):
        await request(celery).send(group([celery.signature("work")]))
