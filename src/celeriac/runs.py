"""What runs where: a record of each run of a task, beside the results.

A run is one delivery of one attempt: `id:retries:nesting`, since a retry and `Task.replace` publish
the same id on purpose. The record is written before the body begins and removed when its end is
written, in the same steps as the states. So the starts that had no end are counted, a run that
others have superseded changes nothing, and whoever notices that a worker is gone writes what it
cannot: the end of a run that was acknowledged early, the return of one that was not.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import redis
from billiard.exceptions import WorkerLostError
from celery import Celery, Task, states
from celery.app.task import Context
from kombu.utils.json import dumps

from celeriac import events, lease, records
from celeriac.lease import Script, execute

logger = logging.getLogger(__name__)

# Of a run that a later one has superseded; of those that must not begin.
STALE, CANCELLED, DOUBLED = -1, -2, -3

# A SUCCESS is overwritten by nothing, as in Celery, which reads it first. A retry is published
# before its state is written: it may have begun, or ended, by then. Who cancels a task that has not
# begun ends it; the worker that finds its message says so again. A worker's main process may report
# an end after the run did. What is revoked by Celery's remote control may be in any queue. Where no
# event says that a run has begun the record does (`b`).
STORE = Script(
    events.STATUS
    + events.TELL
    + events.CALL_OFF
    + f"local untouched = {records.UNTOUCHED}\n"
    + """
local value, state, field, token, mode = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local event, kept = ARGV[8], ARGV[9]
if mode == 'begin' then
  if redis.call('HEXISTS', KEYS[3], 'c') == 1 then return -2 end
  if ARGV[11] ~= '' then
    redis.call('HSETNX', KEYS[3], 'o', ARGV[11])
    if redis.call('HGET', KEYS[3], 'o') ~= ARGV[11] then return -3 end
    if redis.call('TTL', KEYS[3]) < 0 then redis.call('EXPIRE', KEYS[3], ARGV[9]) end
  end
  local starts, old = 1, redis.call('HGET', KEYS[2], field)
  if old then starts = cjson.decode(old).n + 1 end
  redis.call('HSET', KEYS[2], field, '{"n":' .. starts .. ',' .. ARGV[7])
  if ARGV[10] ~= '' then redis.call('HSETNX', KEYS[3], 'r', ARGV[10]) end
  if event == '' then
    redis.call('HSET', KEYS[3], 'b', field)
    redis.call('EXPIRE', KEYS[3], kept)
  end
elseif field ~= '' then
  if token ~= '' then
    local old = redis.call('HGET', KEYS[2], field)
    if old and not string.find(old, token, 1, true) then return -1 end
    if not old and ends[status()] then return -1 end
  end
  if mode == 'end' then
    redis.call('HDEL', KEYS[2], field)
    if event == '' then redis.call('HDEL', KEYS[3], 'b') end
  end
end
if state == '' then return 1 end
if state == 'RETRY' and field ~= '' then
  local id, retries, nesting = string.match(field, '^(.*):(%d+):(%d+)$')
  if redis.call('HEXISTS', KEYS[2], id .. ':' .. (retries + 1) .. ':' .. nesting) == 1 then
    return 0
  end
end
local old = status()
if old == 'SUCCESS' or ends[old] and (value == '' or state == 'RETRY'
  or old == state and (state == 'REVOKED' or token == '')) then return 0 end
local revoked = state == 'REVOKED' and token == ''
if revoked and old == '' and redis.call('HEXISTS', KEYS[3], 'c') == 1 and told() == state then
  return 0
end
local calls_off = revoked and field == '' and not begun(old)
if event ~= '' then
  if value == '' then tell_apart(event, kept) else tell(event, true, kept) end
end
if value ~= '' then store(value, ARGV[2]) end
if calls_off then call_off(untouched, ARGV[2]) end
return 1
"""
)

# Only while it is still the record that was seen: another start may have replaced it.
_REPLACE = Script(
    events.STATUS
    + events.TELL
    + """
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
end
local old = status()
if ARGV[4] == '' or old == '' or ends[old] then return 1 end
if ARGV[6] ~= '' then tell(ARGV[6], true, '') end
store(ARGV[4], ARGV[5])
return 2
"""
)

# A process that is quicker than the worker's own may have ended it by now.
_ANNOUNCE = Script(
    events.STATUS
    + """
local old = status()
if ends[old] or (old == 'RETRY' and ARGV[3] == '1') then return 0 end
return redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
"""
)

# Not while its worker is alive: it may be running.
_FORGET = Script("""
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old or redis.call('ZSCORE', KEYS[2], cjson.decode(old).w) then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
""")
_STORED = 2
_DAY = 86400.0
_LOST = "the worker of this task is gone"
CUT_OFF = "the worker was shut down while this task ran"


@dataclass(slots=True)
class Run:
    """One run in this process."""

    field: str
    token: str
    record: str
    begun: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a run that began and has not ended."""

    field: str
    starts: int  # without an end
    holder: str  # of the lease; "" where its worker is known to be gone
    token: str  # of the one who began it
    began: float
    context: dict[str, Any] | None  # of a run that was acknowledged early
    raw: bytes

    @classmethod
    def read(cls, field: str, raw: bytes) -> "Record":
        found = json.loads(raw)
        return cls(field, found["n"], found["w"], found["k"], found["t"], found.get("x"), raw)


_keepers: WeakKeyDictionary[Celery, "Runs"] = WeakKeyDictionary()
_number = count()


def of(app: Celery) -> "Runs | None":
    """The runs of `app`, in its workers; None where its results are in no Redis."""
    return _keepers.get(app)


def field_of(request: Any) -> str:
    """Of a task's request, or of Celery's worker's."""
    get = request.request_dict.get if hasattr(request, "request_dict") else request.get
    return f"{request.id}:{get('retries') or 0}:{get('replaced_task_nesting') or 0}"


def field_of_headers(headers: Mapping[str, Any]) -> str:
    """Of a message."""
    get = headers.get
    return f"{get('id')}:{get('retries') or 0}:{get('replaced_task_nesting') or 0}"


def forget(client: redis.Redis, prefix: str, field: str) -> None:
    """Count the starts of a run anew, unless it may be running."""
    _FORGET.run(client, [key_of(prefix), _leases_of(key_of(prefix)) + "leases"], field)


def begin(task: Task, request: Any) -> Run | None:
    """Give the `request` of `task`, which is about to start, its run; not written yet."""
    runs = _keepers.get(task.app)
    if runs is None or request.called_directly or request.is_eager:
        return None
    token = f'"k":"{runs.holder}.{os.getpid()}.{next(_number)}"'
    context = "" if task.acks_late else f',"x":{_context_of(task, request)}'
    record = f'"w":"{runs.holder}",{token},"t":{int(time.time())}{context}}}'
    run = request.celeriac_run = Run(field_of(request), token, record)
    return run


# Of a request, what the end of its run needs; its arguments stay out.
_KEPT = (
    "id", "root_id", "parent_id", "group", "group_index", "chord", "chain", "errbacks", "retries",
    "replaced_task_nesting", "ignore_result", "reply_to", "correlation_id", "stamps",
    "stamped_headers", records.OWNER,
)  # fmt: skip


def _context_of(task: Task, request: Any) -> str:
    kept = {name: value for name in _KEPT if (value := request.get(name))}
    text: str = dumps(kept | {"task": task.name})  # type: ignore[no-untyped-call]
    return text


class Runs:
    """Those of one app; `prefix` is that of the results' keys.

    Seen from its workers, or from elsewhere, where none begin and those whose worker is gone end.
    """

    def __init__(
        self,
        app: Celery,
        client: redis.Redis,
        prefix: str,
        seconds: float,
        *,
        in_worker: bool = True,
    ) -> None:
        self._app, self._client = app, client
        self.key = key_of(prefix)
        self._lease = lease.Lease(client, _leases_of(self.key), seconds)
        self.holder = self._lease.holder
        if in_worker:
            _keepers[app] = self

    def keep(self, keeper: lease.Keeper) -> None:
        """Renew the lease of those that begin here, and end those whose worker is gone."""
        keeper.add(lease.Holding(self._lease, self._lose, self._take_over))

    def announce(self, task: str, request: dict[str, Any], *, elsewhere: bool) -> None:
        """Record a run that is about to be acknowledged; once it has begun or ended, no more.

        `elsewhere`: in another process, where it may have. Of a second attempt that begins after
        a first one it cannot be told whether it has ended as that did: then it is not recorded.
        """
        field = field_of_headers(request)
        kept = {name: value for name in _KEPT if (value := request.get(name))}
        context: str = dumps(kept | {"task": task})  # type: ignore[no-untyped-call]
        now = int(time.time())
        record = f'{{"n":0,"w":"{self.holder}","k":"","t":{now},"x":{context}}}'
        keys = self._app.backend.keys_of(request["id"])
        retry_ends = elsewhere or not request.get("retries")
        _ANNOUNCE.run(self._client, keys, field, record, int(retry_ends))

    def find(self, field: str) -> Record | None:
        raw = execute(self._client, "HGET", self.key, field)
        return Record.read(field, raw) if raw else None

    def alive(self, record: Record) -> bool:
        """Whether the worker of a run still renews its lease."""
        found = execute(self._client, "ZSCORE", self._lease.keys[0], record.holder)
        return bool(record.holder) and found is not None

    def give_back(self, field: str) -> None:
        """Say that a run here is over whose process is gone, while this worker lives on."""
        record = self.find(field)
        if record is not None and record.holder == self.holder:
            self._return(record)

    def all(self) -> Iterator[Record]:
        for field, raw in self._client.hscan_iter(self.key, count=1000):
            yield Record.read(field.decode(), raw)

    def _lose(self) -> None:
        logger.warning("the runs of this worker were given up while it did not renew its lease")

    def _take_over(self, holder: str) -> None:
        for record in self.all():
            if record.holder == holder:
                if record.context is None:
                    self._return(record)
                else:
                    self._fail(record)
            elif not record.holder and time.time() - record.began > _DAY:
                execute(self._client, "HDEL", self.key, record.field)

    def give_up(self) -> set[str]:
        """Of this worker's own runs, which end with it: write what becomes of them.

        Those that were acknowledged early fail; their fields. The others wait again, and were
        never started: their worker did not die of them.
        """
        failed = set()
        for record in self.all():
            if record.holder != self.holder or not record.token.startswith(f"{self.holder}."):
                continue  # another's, which the keeper takes over just now
            if record.context is not None:
                self._fail(record, CUT_OFF)
                failed.add(record.field)
            elif record.starts > 1:
                self._replace(record, states.PENDING, w="", n=record.starts - 1)
            else:
                self._replace(record, states.PENDING)
        return failed

    def over(self, field: str) -> bool:
        """Whether the run of this field has ended, of which there is no record."""
        task_id, retries, _ = field.rsplit(":", 2)
        state = self._app.backend._get_task_meta_for(task_id)["status"]
        return state in states.READY_STATES or (state == states.RETRY and retries == "0")

    def _replace(self, record: Record, state: str = "", **changes: Any) -> Record | None:
        """The record with `changes`; without any it is removed.

        None where it is not any more what it was.
        """
        task_id, _, _ = record.field.rsplit(":", 2)
        # Without a space, as its token is looked for: the run may live on, and end.
        new = json.loads(record.raw) | changes
        changed = json.dumps(new, separators=(",", ":")) if changes else ""
        backend = self._app.backend
        value = event = ""
        if state:
            meta = backend._get_result_meta(None, state, None, None)
            value = backend.encode(meta | {"task_id": task_id, "date_done": None})
            event = events.of_state(state)
        arguments = record.field, record.raw, changed, value, backend.expires or 0
        told = "" if backend.shows_elsewhere else event
        done = _REPLACE.run(self._client, backend.keys_of(task_id), *arguments, told)
        if not done:
            return None
        if done == _STORED:
            backend.show(task_id, value, state, event)
        return Record.read(record.field, changed.encode() or record.raw)

    def _return(self, record: Record) -> None:
        """Its message goes back to the queue, or is there: it waits again, and has not ended."""
        if self._replace(record, states.PENDING, w=""):
            logger.warning("task %s lost its process and waits again", record.field)

    def end_lost(self, record: Record) -> None:
        """End a run that was acknowledged early, or about to be, and whose worker is gone."""
        self._fail(record)

    def _fail(self, record: Record, reason: str = _LOST) -> None:
        """Its message is gone: nobody else can say how it ended."""
        ours = self._replace(record, w=self.holder)  # if we die now, the next one goes on
        if ours is None:
            return
        try:
            self._report(ours, WorkerLostError(reason))
        except Exception:
            self._replace(ours, w=record.holder)  # so that it is found again
            raise
        execute(self._client, "HDEL", self.key, record.field)

    def _report(self, record: Record, error: Exception) -> None:
        assert record.context is not None
        request, backend = Context(record.context), self._app.backend
        logger.error("task %s was acknowledged early: %s", record.field, error)
        stored = backend._get_task_meta_for(request.id)
        with records.as_owner(records.owner_of(request) or ""):
            if stored["status"] == states.SUCCESS:  # and what follows it was not sent
                backend.mark_as_done(request.id, stored["result"], request, store_result=False)
            else:
                backend.mark_as_failure(request.id, error, request=request)


def key_of(prefix: str) -> str:
    return f"{prefix}celeriac:runs"


def _leases_of(key: str) -> str:
    return f"{key}:"
