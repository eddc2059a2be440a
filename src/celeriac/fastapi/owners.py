"""Whose task it is, and who may see it.

An owner policy is a dependency of FastAPI's that gives the owner of a connection, a request's or a
WebSocket's: a string, "" for nobody, or PUBLIC for one who may see every task.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Literal

from fastapi import Depends
from itsdangerous import BadSignature, URLSafeTimedSerializer

from celeriac import records

PUBLIC: Final = "*"
OwnerPolicy = Callable[..., Any]


def public() -> Literal["*"]:
    """The policy that shows every task to everybody who knows its id."""
    return PUBLIC


def owned_by(policy: OwnerPolicy) -> Callable[..., AsyncIterator[None]]:
    """A dependency: what a request publishes belongs to its owner.

    `FastAPI(dependencies=[Depends(owned_by(policy))])`, or those of a router.
    """

    async def publish_as_owner(owner: str = Depends(policy)) -> AsyncIterator[None]:
        records.set_owner("" if owner == PUBLIC else owner)
        yield

    return publish_as_owner


def may_see(owner: str, record: records.Record | None, *, unowned: bool = False) -> bool:
    """Whether `owner`, as a policy gives it, may see the task of this record.

    `unowned`: also if it is nobody's, such as one that was sent from a shell.
    """
    if owner == PUBLIC:
        return True
    if record is None or not record.owner:
        return unowned
    return record.owner == owner


class ReadTokens:
    """Signed and short-lived: who has one may read one task, or all of an owner, without a cookie.

    For pages on other origins, `?token=` in the address. `secret` is at least 16 characters.
    """

    def __init__(self, secret: str, *, seconds: int = 300) -> None:
        if len(secret) < 16:
            raise ValueError("secret: expected at least 16 characters")
        self._signer, self._seconds = URLSafeTimedSerializer(secret, salt="celeriac-read"), seconds

    def of_task(self, task_id: str) -> str:
        """A token for this task alone."""
        return str(self._signer.dumps({"task": task_id}))

    def of_owner(self, owner: str) -> str:
        """A token for all tasks of this owner."""
        return str(self._signer.dumps({"owner": owner}))

    def allows(self, token: str, task_id: str, record: records.Record | None) -> bool:
        try:
            scope = self._signer.loads(token, max_age=self._seconds)
        except BadSignature:
            return False
        if scope.get("task") == task_id:
            return True
        return "owner" in scope and may_see(scope["owner"], record) and scope["owner"] != PUBLIC
