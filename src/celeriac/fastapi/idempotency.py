"""The same request twice, one task: `Idempotency-Key` on routes that send one.

See the IETF's draft "The Idempotency-Key HTTP Header Field". Keys are an owner's own, and are kept
for a day in the status store.
"""

import asyncio
import hashlib
import json
from typing import Annotated, Any
from uuid import uuid4

import redis
from celery.canvas import Signature
from fastapi import Depends, Header, HTTPException, Request, status

from celeriac import publish, records
from celeriac.errors import PublishError, ServiceError
from celeriac.handle import Handle, handle
from celeriac.lease import Script

_KEPT = 86400  # seconds
_CLAIM = 10  # seconds that one request has to send its task
_PAUSE = (0.01, 0.2)  # seconds between looks at another request's outcome

# The task's id of who came first with this key; "sent" once its message is.
_TAKE = Script("""
local old = redis.call('GET', KEYS[1])
if old then return old end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return false
""")
_SETTLE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
""")


class Idempotency:
    """Of one request: `send` gives the same task for the same key, however often it comes."""

    def __init__(self, request: Request, key: str | None, fingerprint: str) -> None:
        self._app, self._key, self._fingerprint = request.app.celery, key, fingerprint

    async def send(self, signature: Signature, **options: Any) -> Handle:
        """Publish `signature`, or give the handle of the task that an earlier request published.

        Raises HTTPException 422 where the key came with another request, and PublishError.
        """
        book = records.book_of(self._app)
        if self._key is None or not isinstance(book, records.Book):
            return await publish.aapply_async(signature, **options)
        digest = hashlib.sha256(f"{records.current_owner()}\0{self._key}".encode()).hexdigest()
        place = f"{book.prefix}celeriac:idempotency:{digest}"
        own = {"print": self._fingerprint, "task_id": str(uuid4())}
        for pause in _pauses():
            taken = await self._run(book, _TAKE, place, json.dumps(own), _CLAIM)
            if taken is None:
                return await self._send(book, place, own, signature, options)
            first = json.loads(taken)
            if first["print"] != self._fingerprint:
                raise HTTPException(
                    status.HTTP_422_UNPROCESSABLE_CONTENT,
                    "this Idempotency-Key was used for another request",
                )
            if first.get("sent"):
                return handle(self._app.AsyncResult(first["task_id"]))
            await asyncio.sleep(pause)  # another request sends it just now
        raise ServiceError("another request with this Idempotency-Key has no outcome yet")

    async def _send(
        self, book: records.Book, place: str, own: dict[str, str], signature: Signature,
        options: dict[str, Any],
    ) -> Handle:  # fmt: skip
        sent: dict[str, Any] = own | {"sent": True}
        try:
            made = await publish.aapply_async(signature, task_id=own["task_id"], **options)
        except BaseException as error:
            if not getattr(error, "maybe_accepted", False):
                sent = {}
            raise
        finally:
            text = json.dumps(sent) if sent else ""
            await self._run(book, _SETTLE, place, json.dumps(own), text, _KEPT)
        return made

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
