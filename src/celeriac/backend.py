"""What a worker writes about its tasks: Celery's Redis result backend, and what it leaves out."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import cached_property, partial
from typing import Any
from weakref import WeakSet

import celery.backends.redis
import redis
from celery import Celery, Task, states
from celery.app.task import get_actual_ignore_result
from celery.exceptions import BackendStoreError, Ignore, TaskRevokedError
from celery.signals import task_postrun, task_prerun
from redis.exceptions import (
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)

from celeriac import bridge, events, lease, records, runs, store
from celeriac.errors import PublicError, PublishError
from celeriac.lease import Script
from celeriac.pipeline import Command, Pipeline
from celeriac.registry import Registry

logger = logging.getLogger(__name__)

_SILENCE = 5.0  # seconds without an answer after which it is asked again, or a thread tries
_KEEPER_TIMEOUT = 5.0  # seconds
_STATUS_PAUSE = 5.0  # seconds without a status store that was away: each try may take two

# What Redis refuses for a while: a full memory, a replica on its way to be the master.
_REFUSED = OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError
_TEMPORARY = ("MISCONF", "NOREPLICAS", "MASTERDOWN")
_AGAIN = (0.1, 2.0)  # seconds before the first try after a failed one, and at most

_ENDED_AT_ONCE = 2

_reported: WeakSet[Celery] = WeakSet()
_lines: Registry[Pipeline] = Registry()


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

    native = True  # over a connection of the event loop
    _status_away_until = 0.0

    def on_task_call(self, producer: Any, task_id: str) -> None:
        pass

    def get(self, key: bytes) -> Any:
        if self.native and bridge.hosted():
            with suppress(PublishError):
                return self._await(("GET", key))
        return bridge.offload(super().get, key)

    def set(self, key: bytes, value: Any, expires: int | None = None, **policy: Any) -> Any:
        lifetime = self.expires if expires is None else expires
        store = ("SET", key, value, "EX", lifetime) if lifetime else ("SET", key, value)
        if (
            self.native
            and bridge.hosted()
            and self._status is None
            and len(value) <= self._MAX_STR_VALUE_SIZE
        ):
            with suppress(PublishError):
                return self._await(store, ("PUBLISH", key, value))
        return bridge.offload(super().set, key, value, expires, **policy)  # with Celery's retries

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **options: Any,
    ) -> Any:
        """In one step with the record of the run (see `runs`), where Celery reads first."""
        run, mode = _step_of(request, state)
        again = getattr(request, "celeriac_retry_at", None) if state == states.RETRY else None
        event = events.of_state(state, getattr(result, "error", result), again)
        emitter = getattr(request, "celeriac_emitter", None)
        if emitter and request.id == task_id and emitter.takes(state):
            emitter.state(state, result, event)
            return result
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        value = self.encode(meta | {"task_id": task_id})
        if len(value) > self._MAX_STR_VALUE_SIZE:
            raise BackendStoreError("value too large for Redis", state=state, task_id=task_id)
        self._step(task_id, value, state, run, mode, event, request)
        return result

    def encode_result(self, result: Any, state: str) -> Any:
        encoded = super().encode_result(result, state)
        if isinstance(result, PublicError) and type(encoded) is dict:
            encoded = _Encoded(encoded)
            encoded.error = result
        return encoded

    def _get_result_meta(self, result: Any, state: str, *args: Any, **options: Any) -> Any:
        # Celery's way to the time is a tenth of what a task costs: it asks, for UTC too, whether
        # the clocks were put back just now.
        if state not in self.READY_STATES or type(self.app).now is not Celery.now:
            return super()._get_result_meta(result, state, *args, **options)
        meta = super()._get_result_meta(result, states.STARTED, *args, **options)
        now: Any = datetime.now(self.app.timezone)
        formatted = options.get("format_date", True)
        return meta | {"status": state, "date_done": now.isoformat() if formatted else now}

    def _step(
        self,
        task_id: str,
        value: Any,
        state: str,
        run: runs.Run | None,
        mode: str,
        event: str = "",
        request: Any = None,
    ) -> None:
        """Store a state, tell of it, and note the begin or the end of its run."""
        emitter = getattr(request, "celeriac_emitter", None)
        if emitter:  # what the body told comes before its end
            emitter.drain()
        own = (run.field, run.token, mode, run.record) if run else ("", "", "", "")
        begins = mode == "begin"
        record = _record_text(self.app, request) if begins else ""
        kept = self._kept(state, mode)
        told = ("", kept, "") if self.shows_elsewhere else (event, kept, record)
        once = getattr(request, records.ONCE, "") if begins else ""
        stored = self._call(
            runs.STORE,
            self.keys_of(task_id),
            (value, self._lifetime(state), state, *own, *told, once),
            until_written=bool(run),
        )
        if stored in (runs.CANCELLED, runs.DOUBLED):
            request.celeriac_refused = stored
            return
        if run is not None:
            run.begun, run.ended = True, run.ended or mode == "end"
        if stored == runs.STALE:
            logger.warning("a later run of task %s counts: %s is not recorded", task_id, state)
        if stored == 1 and event:
            token = run.token if run and begins else ""
            self.show(task_id, value, state, event, record, token)

    def keys_of(self, task_id: str) -> list[Any]:
        """The result, the runs, the record and the events: what the scripts take."""
        prefix = self.prefix
        return [
            self.get_key_for_task(task_id),
            runs.key_of(prefix),
            records.key_of(prefix, task_id),
            records.events_key_of(prefix, task_id),
        ]

    def _kept(self, state: str, mode: str) -> Any:
        """Seconds that what is known of the task lasts from now on; "" where that stays."""
        if state in self.READY_STATES:
            return self._lifetime(state)
        return records.UNTOUCHED if mode == "begin" or state == states.PENDING else ""

    def end(self, run: runs.Run, task_id: str) -> None:
        """Note that a run has ended, whose last state left something to do."""
        if run.begun and not run.ended:
            self._step(task_id, "", "", run, "end")

    def end_ignored(self, run: runs.Run | None, task_id: str, request: Any) -> None:
        """Tell of a run that ended with Ignore: Celery keeps the state as the body left it.

        None is that of a task which was called where it runs.
        """
        if run is None or (run.begun and not run.ended):
            event = events.of_state(states.REVOKED, Ignore("it ended without a result"))
            self._step(task_id, "", states.REVOKED, run, "end", event, request)

    @cached_property
    def prefix(self) -> str:
        """Of all keys."""
        key: bytes = self.task_keyprefix
        return key.decode().removesuffix("celery-task-meta-")

    def _lifetime(self, state: str) -> int:
        failed = state == states.FAILURE and self.failure_expires is not None
        return (self.failure_expires if failed else self.expires) or 0

    def _call(
        self, script: Script, keys: list[Any], arguments: tuple[Any, ...], *, until_written: bool
    ) -> Any:
        """A script's reply; of a task that runs, however long Redis is away."""
        if self.native and bridge.hosted():
            return bridge.run(self._call_here(script, keys, arguments, until_written))
        return bridge.offload(self._call_in_thread, script, keys, arguments, until_written)

    def _call_in_thread(
        self, script: Script, keys: list[Any], arguments: tuple[Any, ...], until_written: bool
    ) -> Any:
        waits = _waits()
        while True:
            try:
                return script.run(self.client, keys, *arguments)
            except (*self.connection_errors, redis.ResponseError) as error:
                wait = next(waits)
                if not _passes(error) or (wait >= _AGAIN[1] and not until_written):
                    raise
                time.sleep(wait)

    async def _call_here(
        self, script: Script, keys: list[Any], arguments: tuple[Any, ...], until_written: bool
    ) -> Any:
        rest, waits = (len(keys), *keys, *arguments), _waits()
        while True:
            try:
                try:
                    return await self._send((("EVALSHA", script.sha, *rest),))
                except NoScriptError:
                    return await self._send((("EVAL", script.source, *rest),))
            except (PublishError, redis.ResponseError) as error:
                wait = next(waits)
                if not _passes(error) or (wait >= _AGAIN[1] and not until_written):
                    raise
                await asyncio.sleep(wait)

    def _await(self, *commands: Command) -> Any:
        """The last one's reply, over the running loop's connection to the result backend."""
        return bridge.run(self._send(commands))

    def _new_line(self) -> Pipeline:
        return Pipeline(partial(store.result_connection, self))

    async def _send(self, commands: tuple[Command, ...]) -> Any:
        line = await _lines.get(self.app, self._new_line)
        return await line.send(*commands, deadline=asyncio.get_running_loop().time() + _SILENCE)

    def on_chord_part_return(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        with _as_its_owner(request):
            return bridge.offload_wait(super().on_chord_part_return, request, *args, **kwargs)

    def set_chord_size(self, *args: Any, **kwargs: Any) -> Any:
        return bridge.offload(super().set_chord_size, *args, **kwargs)

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        with bridge.running_direct_calls(), _as_its_owner(request):
            super()._call_task_errbacks(request, exc, traceback)

    @cached_property
    def _status(self) -> redis.Redis | None:
        return store.status_client(self.app)

    @property
    def shows_elsewhere(self) -> bool:
        """Whether the app has a status store of its own."""
        return self._status is not None

    def cancel(self, task_id: str, reason: str = "cancelled", *, expired: bool = False) -> bool:
        """Let a task that has not ended begin no more; whether it has not ended. Blocks.

        `expired`: only one that has not begun, of which Celery's result says nothing then.
        """
        error = TaskRevokedError(reason)
        meta = self._get_result_meta(
            result=error, state=states.REVOKED, traceback=None, request=None
        )
        meta["result"] = self.prepare_exception(error)
        event = events.of_state(states.REVOKED, error)
        value, lifetime = self.encode(meta | {"task_id": task_id}), self._lifetime(states.REVOKED)
        keys, kept = self.keys_of(task_id), records.UNTOUCHED
        if self._status is not None:  # which alone knows its ETA
            kept = max(kept, lease.execute(self._status, "TTL", keys[2]))
        told = "" if self.shows_elsewhere else event
        arguments = value, lifetime, told, kept, "1" if expired else ""
        done = events.CANCEL.run(self.client, keys, *arguments)
        if done == _ENDED_AT_ONCE:
            self.show(task_id, "" if expired else value, states.REVOKED, event)
        return bool(done)

    async def emit(
        self, task_id: str, run: runs.Run | None, token: str, number: int, batch: list[Any],
        value: Any,
    ) -> bool:  # fmt: skip
        """Tell of what a run says, from its `number` on; whether it still counts."""
        pairs = [each for pair in batch for each in pair]
        keys, lifetime = self.keys_of(task_id), self.expires or 0
        if self.shows_elsewhere:
            arguments = "", token, number, value, lifetime, *pairs
            done = await asyncio.to_thread(self._show_there, events.EMIT, keys, arguments)
            return bool(done != runs.STALE)
        field = run.field if run is not None else ""
        arguments = field, token, number, value, lifetime, *pairs
        if self.native:
            done = await self._call_here(events.EMIT, keys, arguments, until_written=True)
        else:
            call = partial(self._call_in_thread, events.EMIT, keys, arguments, until_written=True)
            done = await asyncio.to_thread(call)
        return bool(done == 1)

    def show(
        self, task_id: str, value: Any, state: str, event: str, record: str = "", token: str = ""
    ) -> None:
        """Tell of a state in the app's own status store, if it has one."""
        if self._status is not None:
            told = value, self._lifetime(state), event, self._kept(state, ""), record, token, ""
            bridge.offload(self._show_there, events.SHOW, self.keys_of(task_id), told)

    def show_missed(self, task_id: str) -> bool:
        """Tell of an end in the status store that was away then; whether there was one. Blocks."""
        value = self.client.get(self.get_key_for_task(task_id)) if self._status else None
        if value is None:
            return False
        meta = self.decode(value)
        if meta["status"] not in self.READY_STATES:
            return False
        state, lifetime = meta["status"], self._lifetime(meta["status"])
        told = value, lifetime, events.of_state(state, meta.get("result")), lifetime, "", "", "1"
        self._show_there(events.SHOW, self.keys_of(task_id), told)
        return True

    def _show_there(self, script: Script, keys: list[Any], arguments: tuple[Any, ...]) -> Any:
        if time.monotonic() < self._status_away_until:
            return None
        assert self._status is not None
        try:
            return script.run(self._status, keys, *arguments)
        except redis.RedisError as error:
            # The result is safe; whoever watches this task sees it later.
            self._status_away_until = time.monotonic() + _STATUS_PAUSE
            logger.error("the status store did not take what %r tells: %s", keys[2], error)
            return None


class _Encoded(dict[str, Any]):
    """What Celery's JSON makes of an error, and the error itself."""

    error: Exception


def _as_its_owner(request: Any) -> AbstractContextManager[None]:
    """What follows a task is its owner's, also where the worker's main process sends it."""
    return records.as_owner(records.owner_of(request) or records.current_owner())


def _record_text(app: Celery, request: Any) -> str:
    """Of a task that begins, should there be none yet."""
    where = request.delivery_info or {}
    named = {"task": request.task, "expires": request.expires}
    return records.text_of(named, records.owner_of(request) or "", where.get("routing_key"))


def _step_of(request: Any, state: str) -> tuple[runs.Run | None, str]:
    """The run that a state belongs to, and what the state is to it."""
    if getattr(request, "id", None) is None or getattr(request, "is_eager", False):
        return None, ""  # Celery's stand-in for an unknown task's has no id
    run: runs.Run | None = getattr(request, "celeriac_run", None)
    over = state in states.READY_STATES or state == states.RETRY
    if run is None:  # Celery's worker writes what the process of the task could not
        return (runs.Run(runs.field_of(request), "", ""), "end") if over else (None, "")
    if not run.begun:
        return run, "begin"
    # What follows an end is the run's too: it is over when that is sent.
    follows = request.chord or request.chain or request.errbacks
    return run, "end" if over and not follows else "check"


def _waits() -> Iterator[float]:
    wait, longest = _AGAIN
    while True:
        yield min(wait, longest)
        wait *= 2


def _passes(error: Exception) -> bool:
    if isinstance(error, redis.ResponseError):
        return isinstance(error, _REFUSED) or str(error).startswith(_TEMPORARY)
    return True


class SentinelBackend(RedisBackend, celery.backends.redis.SentinelBackend):  # type: ignore[misc]
    """The same for `sentinel://`, over Celery's own connections."""

    native = False


# By scheme, as a Celery loader's `override_backends` takes them.
BACKENDS = dict.fromkeys(("redis", "rediss"), f"{__name__}:{RedisBackend.__name__}") | {
    "sentinel": f"{__name__}:{SentinelBackend.__name__}"
}


def report_ignored_results(app: Celery) -> None:
    """Record the states of `ignore_result` tasks too: only their value is ignored.

    Celery records neither their start nor their success, so they read PENDING for ever. Their
    failures, and those that a dead worker cannot report, it records if told to.
    """
    app.add_defaults({"task_store_errors_even_if_ignored": True})
    _reported.add(app)
    task_prerun.connect(_started, dispatch_uid="celeriac.backend.started")
    task_postrun.connect(_ended, dispatch_uid="celeriac.backend.ended")


def keep_runs(app: Celery, keeper: lease.Keeper, *, in_worker: bool = True) -> None:
    """Record the runs of `app`'s tasks in this worker, where its results are in a Redis.

    Elsewhere than in a worker, end those whose worker is gone: there may be no other worker.
    """
    backend = app.backend
    if isinstance(backend, RedisBackend):
        waiting = {"socket_timeout": _KEEPER_TIMEOUT}  # at most, on the keeper's thread
        given = {name: value for name, value in backend.connparams.items() if value is not None}
        client = backend._create_client(**backend.connparams | waiting | given)
        known = runs.Runs(app, client, backend.prefix, keeper.seconds, in_worker=in_worker)
        known.keep(keeper)


def _started(sender: Task, task_id: str, **_: Any) -> None:
    request = sender.request  # each look for it costs
    run = runs.begin(sender, request)
    if _ignored(sender, request) or (request.is_eager and sender.store_eager_result):
        _record(sender, task_id, states.STARTED)
    elif run is not None and not sender.track_started:
        sender.app.backend._step(task_id, "", "", run, "begin", request=request)


def _ended(sender: Task, task_id: str, state: str | None, retval: Any = None, **_: Any) -> None:
    request = sender.request
    if state == states.SUCCESS and _ignored(sender, request):
        _record(sender, task_id, states.SUCCESS)
    request.celeriac_emitter = None  # which holds the request
    run = getattr(request, "celeriac_run", None)
    ignored = state == states.IGNORED and not _goes_on(request, retval)
    if run is None:
        followed = request.is_eager and sender.store_eager_result
        if ignored and followed and isinstance(sender.app.backend, RedisBackend):
            sender.app.backend.end_ignored(None, task_id, request)
    elif not run.ended and state is not None:  # without one others say why it was cut off
        if ignored:
            sender.app.backend.end_ignored(run, task_id, request)
        sender.app.backend.end(run, task_id)


def _goes_on(request: Any, ignored: Any) -> bool:
    """Whether a body ended with Ignore because another task takes its place, and its id."""
    marked = bool(request.__dict__.get("celeriac_replaced"))
    return marked or str(ignored) == "Replaced by new task"  # of a base class that is not ours


def _ignored(task: Task, request: Any) -> bool:
    ignored: bool = get_actual_ignore_result(task, request)
    return ignored and task.app in _reported and not request.called_directly


def _record(task: Task, task_id: str, state: str) -> None:
    try:
        task.backend.store_result(task_id, None, state, request=task.request)
    except Exception:
        logger.exception("the state %s of task %s was not recorded", state, task_id)
