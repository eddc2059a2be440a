"""What happens to a task, one event after the other, as it is kept and published in Redis.

Each has a number, one above the last. A task's own number 0 is its publishing. The last event that
changed the state is kept in the task's record (`s`) and all of them, to a limit, in a stream whose
ids are the numbers; whoever listens gets each with its number. So a reader sees at once whether it
missed any.
"""

import json
import time
from typing import Any

from celery import states
from pydantic_core import PydanticSerializationError, to_json

from celeriac.errors import PublicError
from celeriac.lease import Script

KEPT = 1000  # events of a task, the newest
LARGEST = 65536  # bytes of one event

# Lua's, as all of these. The keys of every script are the result, the runs, the record, the events.

# With KEYS[1] the result: whether the state that is stored is an end, and which.
STATUS = """
local ends = {SUCCESS = true, FAILURE = true, REVOKED = true}
local function status()
  local old = redis.call('GET', KEYS[1])
  if not old then return '' end
  local ok, meta = pcall(cjson.decode, old)
  return ok and type(meta) == 'table' and meta.status or ''
end
local function store(value, lifetime)
  if tonumber(lifetime) > 0 then
    redis.call('SET', KEYS[1], value, 'EX', lifetime)
  else
    redis.call('SET', KEYS[1], value)
  end
  redis.call('PUBLISH', KEYS[1], value)
end
"""

# With KEYS[3] the record and KEYS[4] the stream, which is the channel too. What has ended
# is kept as long as its result.
TELL = f"""
local function keep(lifetime)
  for _, key in ipairs({{KEYS[3], KEYS[4]}}) do
    if tonumber(lifetime) > 0 then
      redis.call('EXPIRE', key, lifetime)
    else
      redis.call('PERSIST', key)
    end
  end
end
local function tell(event, changes, lifetime)
  local n = redis.call('HINCRBY', KEYS[3], 'n', 1)
  if changes then redis.call('HSET', KEYS[3], 's', n .. ' ' .. event) end
  local id = n .. '-0'
  local added = redis.pcall('XADD', KEYS[4], 'MAXLEN', '~', {KEPT}, id, 'e', event)
  if added.err then  -- of a record that was lost
    redis.call('DEL', KEYS[4])
    redis.call('XADD', KEYS[4], id, 'e', event)
  end
  redis.call('PUBLISH', KEYS[4], n .. ' ' .. event)
  if lifetime ~= '' then keep(lifetime) end
end
"""


# A state, in a status store of its own.
SHOW = Script(
    STATUS
    + TELL
    + """
if ARGV[5] ~= '' then redis.call('HSETNX', KEYS[3], 'r', ARGV[5]) end
tell(ARGV[3], true, ARGV[4])
if ARGV[1] ~= '' then store(ARGV[1], ARGV[2]) end
"""
)

# What a run tells by itself, while it is the one that counts. An answer may have been lost: what
# was told is not told again.
EMIT = Script(
    STATUS
    + TELL
    + """
local field, token, number = ARGV[1], ARGV[2], tonumber(ARGV[3])
if field ~= '' then
  local old = redis.call('HGET', KEYS[2], field)
  if not old or not string.find(old, token, 1, true) then return -1 end
end
local done = redis.call('HGET', KEYS[3], 'e')
local last = 0
if done and string.sub(done, 1, #token) == token then
  last = tonumber(string.sub(done, #token + 2))
end
for i = 6, #ARGV, 2 do
  if number > last then tell(ARGV[i + 1], ARGV[i] == 'state', '') end
  number = number + 1
end
redis.call('HSET', KEYS[3], 'e', token .. ' ' .. (number - 1))
if ARGV[4] ~= '' and not ends[status()] then store(ARGV[4], ARGV[5]) end
return 1
"""
)

# What has not begun ends at once, and whoever finds its message does not begin it.
CANCEL = Script(
    STATUS
    + TELL
    + """
local old = status()
if ends[old] then return 0 end
redis.call('HSET', KEYS[3], 'c', 1)
if ARGV[4] ~= '' then redis.call('EXPIRE', KEYS[3], ARGV[4]) end
if old ~= '' and old ~= 'PENDING' and old ~= 'RETRY' then return 1 end
if ARGV[3] ~= '' then tell(ARGV[3], true, ARGV[2]) end
store(ARGV[1], ARGV[2])
return 2
"""
)


def of_state(state: str, result: Any = None, again: float | None = None) -> str:
    """The event of a task's new state, as anyone may read it: no arguments, no traceback.

    `result` is what Celery stores: an error, or what a state of the task's own reports. The value
    of a SUCCESS stays where it is stored. `again`: when a RETRY is due, in seconds since 1970.
    """
    now = f'"state":"{state}","time":{time.time():.3f}'
    if state in states.EXCEPTION_STATES:
        more: dict[str, Any] = error_of(result)
        if again is not None:
            more["retry_at"] = round(again, 3)
        return f"{{{now},{json.dumps(more)[1:]}"
    if state in (states.STARTED, states.SUCCESS, states.PENDING) or result is None:
        return f"{{{now}}}"
    if not state.isidentifier():
        now = f'"state":{json.dumps(state)},"time":{time.time():.3f}'
    return f'{{{now},"result":{text_of(result)}}}'


def of_own(event: str, data: Any) -> str:
    """A free-form event of the task's."""
    text = f'{{"event":{json.dumps(event)},"time":{time.time():.3f},"data":{text_of(data)}}}'
    if len(text) > LARGEST:
        raise ValueError(f"event {event!r} has {len(text)} bytes: at most {LARGEST} can be sent")
    return text


def text_of(value: Any) -> str:
    """Plain JSON; Celery's brings dates, UUIDs, Decimals and bytes back as such."""
    try:
        return to_json(value, inf_nan_mode="strings", bytes_mode="base64", fallback=repr).decode()
    except PydanticSerializationError as error:
        return json.dumps(f"not JSON: {error}")


def error_of(error: Any) -> dict[str, Any]:
    """`code` and `error` of an exception, or of what Celery's JSON makes of one.

    `safe` is there where the message was written for whoever asked for the task.
    """
    if isinstance(error, PublicError):
        return {"code": error.code, "error": _line(error.message), "safe": True}
    if isinstance(error, dict):
        code, message = str(error.get("exc_type", "Exception")), error.get("exc_message", "")
        module = str(error.get("exc_module", ""))
        if isinstance(message, (list, tuple)):
            if code == PublicError.__name__ and len(message) == 2:
                return error_of(PublicError(*map(str, message)))
            message = ", ".join(map(str, message))
    else:
        code, message, module = type(error).__name__, str(error), type(error).__module__
    told = {"code": code, "error": _line(f"{code}: {message}")}
    ours = module.startswith("celeriac.") or code in _HARMLESS
    return told | {"safe": True} if ours else told


# Of Celery's own errors, those that tell nothing of a task's arguments.
_HARMLESS = {"SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError", "TaskRevokedError"}


def _line(text: str) -> str:
    line = " ".join(text.split()).removesuffix(":")
    return line if len(line) <= 500 else line[:499] + "…"
