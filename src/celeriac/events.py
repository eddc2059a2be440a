"""What happens to a task, one event after the other, as it is kept and published in Redis.

Each has a number, one above the last. A task's own number 0 is its publishing. The last event that
changed the state is kept in the task's record (`s`) and all of them, to a limit, in a stream whose
ids are the numbers; whoever listens gets each with its number. So a reader sees at once whether it
missed any.
"""

import json
import re
import time
from typing import Any

from celery import states
from pydantic_core import to_json

from celeriac.errors import PublicError
from celeriac.lease import Script

KEPT = 1000  # events of a task, the newest
LARGEST = 65536  # bytes of one event
_DIGITS = 4300  # of a number, that Python reads
_LONG_NUMBER = re.compile(rf"\d{{{_DIGITS + 1}}}")
_NAMES = {name: json.dumps(name) for name in (*states.ALL_STATES, "PROGRESS")}

# Lua's, as all of these. The keys of every script are the result, the runs, the record, the events.

# The state that is stored, which may be one of the ends, and the one that was told last. A result
# that is no JSON is taken for what was told of it.
STATUS = """
local ends = {SUCCESS = true, FAILURE = true, REVOKED = true}
local function told()
  local last = redis.call('HGET', KEYS[3], 's')
  local ok, event = pcall(cjson.decode, last and string.match(last, '^%d+ (.*)$') or '')
  return ok and type(event) == 'table' and event.state or ''
end
local function status()
  local old = redis.call('GET', KEYS[1])
  if not old then return '' end
  local ok, meta = pcall(cjson.decode, old)
  if not ok or type(meta) ~= 'table' then return told() end
  return meta.status or ''
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
# is kept as long as its result. An end apart is one that Celery's result does not say: readers
# believe it as long as the state that was stored then (`x`) is stored.
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
  return n
end
local function tell_apart(event, lifetime)
  local n = tell(event, true, lifetime)
  redis.call('HSET', KEYS[3], 'x', n .. ' ' .. status())
end
"""

# Whether any run of the task has begun and not ended, where `state` is what is known of it; and
# the flag that lets none begin, which is there as long as the message may be.
CALL_OFF = """
local function begun(state)
  local run = redis.call('HGET', KEYS[3], 'b')
  if run and redis.call('HEXISTS', KEYS[2], run) == 1 then return true end
  return state ~= '' and state ~= 'PENDING' and state ~= 'RETRY' and not ends[state]
end
local function call_off(seconds, lifetime)
  redis.call('HSET', KEYS[3], 'c', 1)
  local left = redis.call('TTL', KEYS[3])
  keep(tonumber(lifetime) > 0 and math.max(left, tonumber(seconds), tonumber(lifetime)) or 0)
end
"""


# A state, in a status store of its own. Of an end that may have been missed there: if it was.
SHOW = Script(
    STATUS
    + TELL
    + """
local value, event, token = ARGV[1], ARGV[3], ARGV[6]
if ARGV[7] ~= '' and ends[told()] or value == '' and ends[status()] then return 0 end
if ARGV[5] ~= '' then redis.call('HSETNX', KEYS[3], 'r', ARGV[5]) end
if token ~= '' then redis.call('HSET', KEYS[3], 'k', token) end
if value == '' then
  tell_apart(event, ARGV[4])
else
  tell(event, true, ARGV[4])
  store(value, ARGV[2])
end
return 1
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
else  -- the runs are elsewhere: of the last one that began
  local last = redis.call('HGET', KEYS[3], 'k')
  if last and last ~= token or ends[status()] then return -1 end
end
local done = redis.call('HGET', KEYS[3], 'e')
local last = 0
if done and string.sub(done, 1, #token) == token then
  last = tonumber(string.sub(done, #token + 2))
end
for i = 6, #ARGV, 2 do
  if number > last then tell(ARGV[i + 1], ARGV[i] ~= 'event', '') end
  number = number + 1
end
redis.call('HSET', KEYS[3], 'e', token .. ' ' .. (number - 1))
if ARGV[4] ~= '' and not ends[status()] then store(ARGV[4], ARGV[5]) end
return 1
"""
)

# What has not begun ends at once, and whoever finds its message does not begin it. What expired
# ends for those who follow it alone: a worker without the library may run it and not have answered.
CANCEL = Script(
    STATUS
    + TELL
    + CALL_OFF
    + """
local value, lifetime, event, seconds, expired = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] ~= ''
local old = status()
if ends[old] then return 0 end
if old == '' then old = told() end  -- which outlasts a result
local called_off = redis.call('HEXISTS', KEYS[3], 'c') == 1
if called_off and old == 'REVOKED' then return 0 end
local runs = begun(old)
if runs and expired then return 1 end
if not runs and event ~= '' then
  if expired then tell_apart(event, '') else tell(event, true, '') end
end
call_off(seconds, lifetime)
if runs then return 1 end
if not expired then store(value, lifetime) end
return 2
"""
)


def of_state(state: str, result: Any = None, again: float | None = None) -> str:
    """The event of a task's new state, as anyone may read it: no arguments, no traceback.

    `result` is what Celery stores: an error, or what a state of the task's own reports. The value
    of a SUCCESS stays where it is stored. `again`: when a RETRY is due, in seconds since 1970.
    """
    now = f'"state":{_NAMES.get(state) or json.dumps(state)},"time":{time.time():.3f}'
    if state in states.EXCEPTION_STATES:
        more: dict[str, Any] = error_of(result)
        if again is not None:
            more["retry_at"] = round(again, 3)
        return f"{{{now},{json.dumps(more)[1:]}"
    if state in (states.STARTED, states.SUCCESS, states.PENDING) or result is None:
        return f"{{{now}}}"
    return f'{{{now},"result":{text_of(result)}}}'


def of_own(event: str, data: Any) -> str:
    """A free-form event of the task's."""
    text = f'{{"event":{json.dumps(event)},"time":{time.time():.3f},"data":{_json_of(data)}}}'
    if len(text) > LARGEST:
        raise ValueError(f"event {event!r} has {len(text)} bytes: at most {LARGEST} can be sent")
    return text


def text_of(value: Any) -> str:
    """Plain JSON; Celery's brings dates, UUIDs, Decimals and bytes back as such."""
    try:
        return _json_of(value)
    except ValueError as error:
        return json.dumps(f"not JSON: {error}")


def _json_of(value: Any) -> str:
    """The same; raises ValueError for what nobody could read."""
    text = to_json(value, inf_nan_mode="strings", bytes_mode="base64", fallback=repr).decode()
    if len(text) > _DIGITS and _LONG_NUMBER.search(text):
        json.loads(text)
    return text


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
    ours = module == "celeriac.errors" and code in _OUR_HARMLESS
    return told | {"safe": True} if ours or code in _HARMLESS else told


# Of Celery's own errors, those that tell nothing of a task's arguments, and of ours; others tell
# whose address did not answer.
_HARMLESS = {
    "SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError", "TaskRevokedError", "Ignore",
}  # fmt: skip
_OUR_HARMLESS = {"PoisonError", "DeliveryLimitError", "UndeliveredError", "BodyCancelledError"}


def _line(text: str) -> str:
    line = " ".join(text.split()).removesuffix(":")
    return line if len(line) <= 500 else line[:499] + "…"
