"""The pool's own rules, without a worker around it."""

import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest
from celery import Celery

from celeriac import bridge
from celeriac.pool import TaskPool


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    app = Celery("pool", set_as_current=False)
    pool = TaskPool(2, app=app)
    pool.start()
    yield pool
    pool.stop()
    pool._bell.close()  # which a worker leaves to its end
    bridge.close()


def test_a_task_runs_though_celery_cannot_note_that_it_was_accepted(
    pool: TaskPool, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError("the broker has gone")

    ended = threading.Event()
    pool.apply_async(
        lambda name: None,
        ("add",),
        correlation_id="1",
        accept_callback=refuse,
        callback=lambda _: ended.set(),
    )
    assert ended.wait(10)
    assert "what happened to add[1] was not noted" in caplog.text
    assert "the broker has gone" in caplog.text
