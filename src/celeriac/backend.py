"""What a worker writes about its tasks: Celery's Redis result backend, and what it leaves out."""

import asyncio
import logging
import time
from contextlib import suppress
from functools import cached_property
from typing import Any
from weakref import WeakSet

import celery.backends.redis
import redis
from celery import Celery, Task, states
from celery.app.task import get_actual_ignore_result
from celery.signals import task_postrun, task_prerun

from celeriac import bridge, pipeline, store
from celeriac.errors import PublishError

logger = logging.getLogger(__name__)

_SILENCE = 30.0  # seconds without an answer, or in a queue of many, after which a thread tries
_STATUS_PAUSE = 5.0  # seconds without a status store that was away: each try may take two

# A retry is published before its state is written: what it comes to may be there first.
_SET_RETRY = """
local old = redis.call('GET', KEYS[1])
if old then
  local ok, meta = pcall(cjson.decode, old)
  local ended = {SUCCESS = true, FAILURE = true, REVOKED = true}
  if ok and ended[meta.status] then return 0 end
end
if tonumber(ARGV[2]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[1])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"""

_reported: WeakSet[Celery] = WeakSet()
_lines = pipeline.Pipelines()


class RedisBackend(celery.backends.redis.RedisBackend):  # type: ignore[misc]
    """Celery's, except that sending a task does not subscribe to its result.

    `AsyncResult.get` subscribes when it is called. A subscription for each task sent costs two
    round trips and lasts as long as its handle, and most senders never wait.

    Where the app has a status store of its own, each state is written there too, after the result.
    """

    # What need not be handed to a thread on an event loop.
    awaited = frozenset(
        {
            "get_state",
            "get_status",
            "get_task_meta",
            "mark_as_done",
            "mark_as_retry",
            "mark_as_revoked",
            "mark_as_started",
            "process_cleanup",
            "store_result",
        }
    )

    _status_away_until = 0.0

    def on_task_call(self, producer: Any, task_id: str) -> None:
        pass

    def get(self, key: bytes) -> Any:
        if bridge.hosted():
            with suppress(PublishError):
                return self._await(("GET", key))
        return bridge.offload(super().get, key)

    def set(self, key: bytes, value: Any, expires: int | None = None, **policy: Any) -> Any:
        lifetime = self.expires if expires is None else expires
        store = ("SET", key, value, "EX", lifetime) if lifetime else ("SET", key, value)
        if bridge.hosted() and self._status is None and len(value) <= self._MAX_STR_VALUE_SIZE:
            with suppress(PublishError):
                return self._await(store, ("PUBLISH", key, value))
        return bridge.offload(super().set, key, value, expires, **policy)  # with Celery's retries

    def _set_with_state(self, key: bytes, value: Any, state: str) -> Any:
        if state != states.RETRY or self._status is not None:
            return super()._set_with_state(key, value, state)
        command = ("EVAL", _SET_RETRY, 1, key, value, self.expires or 0)
        if bridge.hosted():
            with suppress(PublishError):
                return self._await(command)
        return bridge.offload(self.ensure, self.client.execute_command, command)

    def _await(self, *commands: pipeline.Command) -> Any:
        """The last one's reply, over the running loop's connection to the result backend."""
        return bridge.run(self._send(commands))

    async def _send(self, commands: tuple[pipeline.Command, ...]) -> Any:
        line = await _lines.get(self.app, lambda: store.result_connection(self))
        return await line.send(*commands, deadline=asyncio.get_running_loop().time() + _SILENCE)

    def on_chord_part_return(self, *args: Any, **kwargs: Any) -> Any:
        return bridge.offload(super().on_chord_part_return, *args, **kwargs)

    def set_chord_size(self, *args: Any, **kwargs: Any) -> Any:
        return bridge.offload(super().set_chord_size, *args, **kwargs)

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        with bridge.running_direct_calls():
            super()._call_task_errbacks(request, exc, traceback)

    @cached_property
    def _status(self) -> redis.Redis | None:
        return store.status_client(self.app)

    def _set(self, key: bytes, value: bytes, expires: int | None = None) -> None:
        super()._set(key, value, expires)
        if self._status is None or time.monotonic() < self._status_away_until:
            return
        lifetime = self.expires if expires is None else expires
        try:
            with self._status.pipeline() as pipe:
                pipe.set(key, value, ex=lifetime or None)
                pipe.publish(key, value)
                pipe.execute()
        except redis.RedisError as error:
            # The result is safe; whoever watches this task sees it late or not at all.
            self._status_away_until = time.monotonic() + _STATUS_PAUSE
            logger.error("the status store did not take the state of %r: %s", key, error)


# By scheme, as a Celery loader's `override_backends` takes them.
BACKENDS = dict.fromkeys(("redis", "rediss"), f"{__name__}:{RedisBackend.__name__}")


def report_ignored_results(app: Celery) -> None:
    """Record the states of `ignore_result` tasks too: only their value is ignored.

    Celery records neither their start nor their success, so they read PENDING for ever. Their
    failures, and those that a dead worker cannot report, it records if told to.
    """
    app.add_defaults({"task_store_errors_even_if_ignored": True})
    _reported.add(app)
    task_prerun.connect(_started, dispatch_uid="celeriac.backend.started")
    task_postrun.connect(_ended, dispatch_uid="celeriac.backend.ended")


def _started(sender: Task, task_id: str, **_: Any) -> None:
    if _ignored(sender):
        _record(sender, task_id, states.STARTED)


def _ended(sender: Task, task_id: str, state: str, **_: Any) -> None:
    if state == states.SUCCESS and _ignored(sender):
        _record(sender, task_id, states.SUCCESS)


def _ignored(task: Task) -> bool:
    ignored: bool = get_actual_ignore_result(task, task.request)
    return ignored and task.app in _reported and not task.request.called_directly


def _record(task: Task, task_id: str, state: str) -> None:
    try:
        task.backend.store_result(task_id, None, state, request=task.request)
    except Exception:
        logger.exception("the state %s of task %s was not recorded", state, task_id)
