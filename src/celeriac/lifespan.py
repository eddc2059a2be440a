"""What every worker process of an app opens before its first task and closes after its last."""

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from celery.platforms import EX_FAILURE
from celery.signals import celeryd_after_setup, worker_process_init

from celeriac import bridge

logger = logging.getLogger(__name__)

Lifespan = Callable[[Celery], AbstractAsyncContextManager[object]]

_LEAVING = 10.0  # seconds; a client that does not close holds up no worker's end
_MESSAGE = "the worker's lifespan failed: %s"
_NEEDS_FORK = (
    "the worker's lifespan cannot be entered in processes that are spawned: leave "
    'worker_pool_start_method at "fork", or choose another worker_pool'
)

_given: WeakKeyDictionary[Celery, Lifespan] = WeakKeyDictionary()


def keep(app: Celery, lifespan: Lifespan) -> None:
    """Have the worker processes of `app` live inside `lifespan(app)`."""
    _given[app] = lifespan
    celeryd_after_setup.connect(_of_worker, dispatch_uid=__name__)


class _Entered:
    """A lifespan that was entered, in an asyncio task of its own that leaves it too."""

    def __init__(self, manager: AbstractAsyncContextManager[object]) -> None:
        self._manager = manager

    async def enter(self) -> None:
        self._leave, entered = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._live(entered), name="celeriac-lifespan")
        waiting = asyncio.create_task(entered.wait())
        await asyncio.wait((self._task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            await self._task

    async def _live(self, entered: asyncio.Event) -> None:
        async with self._manager:
            entered.set()
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        async with asyncio.timeout(_LEAVING):
            await self._task


class _Process:
    """The lifespan of this process, which a fork does not inherit."""

    def __init__(self) -> None:
        self.entered: _Entered | None = None
        self.leaving = False
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.entered = None

    def enter(self, app: Celery) -> None:
        entered = _Entered(_given[app](app))
        bridge.run(entered.enter())
        self.entered = entered

    def leave(self) -> None:
        entered, self.entered = self.entered, None
        if entered is None:
            return
        self.leaving = True
        try:
            bridge.run(entered.leave())
        except Exception:
            logger.exception("the worker's lifespan was not left as it should be")
        finally:
            self.leaving = False


_process = _Process()
leave = _process.leave


def is_leaving() -> bool:
    """Whether this process's lifespan is being left."""
    return _process.leaving


def _of_worker(instance: Any, **_: Any) -> None:
    """Before the worker's pool starts."""
    app = instance.app
    if app not in _given:
        return
    from celery.concurrency import prefork  # which only workers need

    if issubclass(instance.pool_cls, prefork.TaskPool):
        if instance.pool_start_method != "fork":
            logger.critical(_NEEDS_FORK)
            raise SystemExit(EX_FAILURE)
        _of_children(app)
        return
    try:
        _process.enter(app)
    except Exception as error:
        logger.critical(_MESSAGE, repr(error), exc_info=True)
        raise SystemExit(EX_FAILURE) from None
    atexit.register(leave)  # a cold shutdown sends no signal


def _of_children(app: Celery) -> None:
    """Each pool process has its own; one that cannot enter it ends the whole worker."""
    from celery.worker import state

    failures, tell = os.pipe()

    def enter(**_: Any) -> None:
        try:
            _process.enter(app)
        except Exception as error:
            logger.critical(_MESSAGE, repr(error), exc_info=True)
            os.write(tell, repr(error).encode()[:1000])
            raise SystemExit(EX_FAILURE) from None

    def listen() -> None:
        reason = os.read(failures, 1000).decode(errors="replace")
        logger.critical(_MESSAGE, reason)
        state.should_stop = EX_FAILURE

    worker_process_init.connect(enter, weak=False)
    threading.Thread(target=listen, name="celeriac-lifespan", daemon=True).start()
