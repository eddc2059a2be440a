"""The same request twice, one task: `Idempotency-Key` on routes that send one.

See the IETF's draft "The Idempotency-Key HTTP Header Field". Keys are an owner's own, and are kept
for a day in the status store. The id of a task is kept before its message is written, and not
dropped then: whatever becomes of the request that came first, the next one with its key gives that
id too.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from typing import Annotated, Any
from uuid import uuid4

import redis
from celery.canvas import Signature, group
from fastapi import Depends, Header, HTTPException, Request, status

from celeriac import publish, records
from celeriac.errors import PublishError, ServiceError
from celeriac.handle import Handle, handle
from celeriac.lease import NOW, Script

logger = logging.getLogger(__name__)

_KEPT = 86400  # seconds
_CLAIM = 10  # seconds that one request has to send its task, before another may
_PAUSE = (0.01, 0.2)  # seconds between looks at another request's outcome
_SENT = "sent"
# As FastAPI documents a 422.
_USED = {
    "type": "idempotency_key_used",
    "loc": ["header", "Idempotency-Key"],
    "msg": "This key was used for another request",
}

# `until` is when whoever sends it now is given up, or "sent". A record that is written in one step
# with the message proves it.
_TAKE = Script(
    NOW
    + """
local first, id, ends = unpack(redis.call('HMGET', KEYS[1], 'print', 'id', 'until'))
if not first then
  id = ARGV[2]
  redis.call('HSET', KEYS[1], 'print', ARGV[1], 'id', id)
  redis.call('EXPIRE', KEYS[1], ARGV[4])
elseif first ~= ARGV[1] then
  return {'other', id, ''}
elseif ends == 'sent' or (ARGV[5] ~= '' and redis.call('EXISTS', ARGV[5] .. id) == 1) then
  return {'sent', id, ''}
elseif tonumber(ends) > now then
  return {'wait', id, ''}
end
ends = tostring(now + 1000 * ARGV[3])
redis.call('HSET', KEYS[1], 'until', ends)
return {'send', id, ends}
"""
)
_SETTLE = Script("""
local ends = redis.call('HGET', KEYS[1], 'until')
if ends and (ends == ARGV[1] or ARGV[2] == 'sent') then
  redis.call('HSET', KEYS[1], 'until', ARGV[2])
end
""")


class Idempotency:
    """Of one request: `send` gives the same task for the same key, however often it comes.

    Several tasks of one request are told apart by their names, and those of one name by their
    order.
    """

    def __init__(self, request: Request, key: str | None, fingerprint: str) -> None:
        self._app, self._key, self._fingerprint = request.app.celery, key, fingerprint
        self._sends = Counter[str]()

    async def send(self, signature: Signature, **options: Any) -> Handle:
        """Publish `signature`, or give the handle of the task that an earlier request published.

        Raises HTTPException 422 where the key came with another request, and PublishError.
        """
        if isinstance(signature, group):
            raise TypeError("expected the signature of what has one id, got a group")
        book = records.book_of(self._app)
        if self._key is None or not isinstance(book, records.Book):
            return await publish.aapply_async(signature, **options)
        name = str(signature.task)
        self._sends[name] += 1
        which = [records.current_owner(), self._key, name, str(self._sends[name])]
        digest = hashlib.sha256("\0".join(which).encode()).hexdigest()
        place = f"{book.prefix}celeriac:idempotency:{digest}"
        proof = records.key_of(book.prefix, "") if book.with_message else ""
        own = self._fingerprint, str(uuid4())
        for pause in _pauses():
            outcome, task_id, until = await self._run(
                book, _TAKE, place, *own, _CLAIM, _KEPT, proof
            )
            match outcome:
                case b"send":
                    return await self._send(
                        book, place, until, signature, task_id.decode(), options
                    )
                case b"sent":
                    return handle(self._app.AsyncResult(task_id.decode()))
                case b"other":
                    raise HTTPException(status.HTTP_422_UNPROCESSABLE_CONTENT, [_USED])
            await asyncio.sleep(pause)  # another request sends it just now
        raise ServiceError("another request with this Idempotency-Key has no outcome yet")

    async def _send(
        self, book: records.Book, place: str, until: bytes, signature: Signature, task_id: str,
        options: dict[str, Any],
    ) -> Handle:  # fmt: skip
        try:
            made = await publish.aapply_async(signature, task_id=task_id, **options)
        except Exception:
            await self._settle(book, place, until, "0")  # the next one may at once
            raise
        await self._settle(book, place, until, _SENT)
        return made

    async def _settle(self, book: records.Book, place: str, until: bytes, outcome: str) -> None:
        try:
            await self._run(book, _SETTLE, place, until, outcome)
        except PublishError as error:  # the claim runs out by itself
            logger.warning("the outcome of an Idempotency-Key is not noted: %s", error)

    async def _run(self, book: records.Book, script: Script, place: str, *arguments: Any) -> Any:
        try:
            return await asyncio.to_thread(script.run, book.client, [place], *arguments)
        except redis.RedisError as error:
            raise PublishError(f"the status store is away: {error}") from error


def _pauses() -> list[float]:
    """Until a claim that nobody settled has run out."""
    pauses: list[float] = []
    pause, longest = _PAUSE
    while sum(pauses) < _CLAIM + 1:
        pauses.append(pause)
        pause = min(pause * 2, longest)
    return pauses


async def _idempotency(
    request: Request,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Idempotency:
    where = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    fingerprint = hashlib.sha256(where + await request.body()).hexdigest()
    return Idempotency(request, idempotency_key, fingerprint)


IdempotencyDep = Annotated[Idempotency, Depends(_idempotency)]
"""In a view that sends a task: `task = await idempotency.send(export.s(42))`."""
