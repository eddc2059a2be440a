"""Whose task it is, and who may see it.

An owner policy gives the owner of a request: a string, "" for nobody, or PUBLIC for one who may see
every task.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from itsdangerous import BadSignature, URLSafeTimedSerializer

from celeriac import records


class Public(Enum):
    """Of one value, which is no string: whatever somebody calls himself, it is not this."""

    PUBLIC = "public"


PUBLIC: Final = Public.PUBLIC
Owner = str | Public


def refusal(owner: Owner) -> str | None:
    """Why nobody may be called so, as what beat's tasks belong to; None of all others."""
    return f"nobody may be called {owner!r}" if owner == records.SYSTEM else None


def publisher(owner: Owner) -> str:
    """Whose the tasks are that `owner` publishes."""
    return "" if owner is PUBLIC else owner


def may_see(owner: Owner, record: records.Record | None, *, unowned: bool = False) -> bool:
    """Whether `owner`, as a policy gives it, may see the task of this record.

    `unowned`: also if it is nobody's, such as one that was sent from a shell.
    """
    if owner is PUBLIC:
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

    def access(self, token: str) -> "Access | None":
        """What it lets see; None for a token that is not valid, or not any more."""
        try:
            scope: dict[str, str] = self._signer.loads(token, max_age=self._seconds)
        except BadSignature:
            return None
        return Access(scope.get("owner", ""), task_id=scope.get("task"), by_token=True)


@dataclass(frozen=True, slots=True)
class Access:
    """What one connection may see: as the owner that a policy gave, or as its token says."""

    owner: Owner = ""
    unowned: bool = False
    task_id: str | None = None  # of the one task that a token is for
    by_token: bool = False

    def allows(self, task_id: str, record: records.Record | None) -> bool:
        if task_id == self.task_id:
            return True
        return may_see(self.owner, record, unowned=self.unowned)
