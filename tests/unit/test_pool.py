"""The pool's own rules, without a worker around it."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from celery import Celery

from celeriac import bridge
from celeriac.pool import TaskPool


@pytest.fixture
def _garbage() -> Iterator[None]:
    """What a pool changes for all of its process."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture
def make_pool(_garbage: None) -> Iterator[Callable[[], TaskPool]]:
    made = []

    def make() -> TaskPool:
        pool = TaskPool(2, app=Celery("pool", set_as_current=False))
        made.append(pool)
        pool.start()
        return pool

    yield make
    for pool in made:
        pool.stop()
        pool._bell.close()  # which a worker leaves to its end
    bridge.close()


@pytest.fixture
def pool(make_pool: Callable[[], TaskPool]) -> TaskPool:
    return make_pool()


@pytest.mark.parametrize(
    ("before", "after"),
    [((700, 10, 10), 10_000), ((2000, 10, 10), 10_000), ((50_000, 5, 5), 50_000), ((0, 0, 0), 0)],
)
def test_python_looks_for_garbage_seldom_where_nobody_has_said_how_often(
    make_pool: Callable[[], TaskPool], before: tuple[int, int, int], after: int
) -> None:
    gc.set_threshold(*before)
    make_pool()
    assert gc.get_threshold() == (after, *before[1:])


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
