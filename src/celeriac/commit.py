"""Publish tasks if and when the caller's transaction commits.

Celery's `delay` inside a transaction sends too early, and after it too late: a worker does not find
the row, or the process dies in between. Here the session sends, after its outermost commit; what
was asked for inside a savepoint shares that one's fate. With an outbox (`celeriac.outbox`) the
message is a row of the same transaction, so that it survives whatever comes after the commit.
"""

import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from datetime import timedelta
from numbers import Real
from typing import Any

from celery import Celery, Task
from celery.canvas import Signature
from kombu.utils.json import dumps
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from celeriac import bridge, publish, records, relay
from celeriac.errors import ConfigurationError
from celeriac.handle import Handle, handle
from celeriac.outbox import Row, outbox_of

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_KEY = "celeriac"  # in a session's `info`


def delay_on_commit(
    task: Task | Signature, session: AnySession, /, *args: Any, **kwargs: Any
) -> Handle:
    """`task.delay(…)`, once `session` has committed, of a task, a signature or a canvas.

    Gives the handle with the id that the task will have; see `apply_async_on_commit`.
    """
    return apply_async_on_commit(task, session, args, kwargs)


def apply_async_on_commit(
    task: Task | Signature,
    session: AnySession,
    args: Iterable[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    ordering_key: str | None = None,
    **options: Any,
) -> Handle:
    """`task.apply_async(…)`, once `session` has committed; nothing if it does not.

    Seconds of `countdown` and `expires` count from now. Those with one `ordering_key` are sent in
    the order of their insertion, which takes an outbox.

    Without an outbox `commit` raises PublishError, with the transaction committed, where the broker
    does not take the message. With one it does not: the message is sent later.

    Raises TypeError here for arguments that the task does not take or the message cannot hold, and
    ConfigurationError for a two-phase session.
    """
    owner = session() if isinstance(session, scoped_session | async_scoped_session) else session
    local = owner.sync_session if isinstance(owner, AsyncSession) else owner
    if not isinstance(local, Session):
        raise TypeError(f"delay_on_commit: expected a session of SQLAlchemy, got {session!r}")
    if local.twophase:
        raise ConfigurationError(
            "delay_on_commit: a two-phase session may commit after a crash, where nobody would "
            "send; use a session without twophase, and an outbox"
        )
    signature = _signature(task, args, kwargs, options)
    if ordering_key is not None and outbox_of(signature.app) is None:
        raise ConfigurationError("ordering_key: takes an outbox, see celeriac.outbox.use_outbox")
    made = handle(signature.freeze())
    pending = local.info.get(_KEY)
    if pending is None:
        pending = local.info[_KEY] = _Pending(local)
    keeps = outbox_of(signature.app) is not None
    text = _text_of(signature) if keeps or signature.app.conf.task_serializer == "json" else ""
    pending.add(_Message(signature, made.id, text, ordering_key))
    return made


def _signature(
    task: Task | Signature,
    args: Iterable[Any] | None,
    kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> Signature:
    given = tuple(args or ()), dict(kwargs or {})
    if isinstance(task, Signature):
        signature = task.clone(*given, **options)
    else:
        if task.typing:
            task.__header__(*given[0], **given[1])
        signature = task.signature(*given, **options)
    if type(signature) is Signature:
        typed = getattr(signature.app.tasks.get(signature.task), "celeriac_arguments", None)
        if typed is not None:
            signature.args, signature.kwargs = typed.dump(signature.args, signature.kwargs)
    now = signature.app.now()
    for name, moment in (("countdown", "eta"), ("expires", "expires")):
        seconds = signature.options.get(name)
        if isinstance(seconds, Real):
            del signature.options[name]
            signature.options[moment] = (now + timedelta(seconds=float(seconds))).isoformat()
    return signature


def _text_of(signature: Signature) -> str:
    """What a row of the outbox keeps. It is read again in a process that has no more than this."""
    owner = records.current_owner()
    for each in records.tasks_in(signature):
        headers = each.setdefault("options", {}).get("headers") or {}
        each["options"]["headers"] = {records.OWNER: owner} | headers
    text: str = dumps(signature)  # type: ignore[no-untyped-call]
    return text


@dataclass(eq=False, slots=True)
class _Message:
    signature: Signature
    task_id: str
    text: str
    ordering_key: str | None
    transaction: SessionTransaction | None = None  # that has to commit
    row: Row | None = None
    row_in: SessionTransaction | None = None  # the one that its row shares the fate of
    inserted: float = 0.0  # by this process's clock

    @property
    def app(self) -> Celery:
        app: Celery = self.signature.app
        return app


class _Pending:
    """What the transactions of one session are to publish."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._messages: list[_Message] = []
        self._committed: list[_Message] = []

    def add(self, message: _Message) -> None:
        session = self._session
        message.transaction = session.get_nested_transaction() or session.get_transaction()
        if message.transaction is None:  # as `session.add` does, without touching the database
            message.transaction = session.begin()
        self._messages.append(message)

    def before_commit(self, session: Session) -> None:
        here = session.get_nested_transaction() or session.get_transaction()
        for app in {each.app for each in self._messages}:
            outbox = outbox_of(app)
            if outbox is None or app.conf.task_always_eager:
                continue
            new = [each for each in self._messages if each.app is app and each.row is None]
            values = [
                {"task_id": each.task_id, "signature": each.text, "ordering_key": each.ordering_key}
                for each in new
            ]
            now = time.monotonic()  # before it takes whatever time
            for each, row in zip(new, outbox.insert(session, values), strict=True):
                each.row, each.row_in, each.inserted = row, here, now
                row.made = each.signature

    def after_commit(self, session: Session) -> None:
        nested = session.get_nested_transaction()
        if nested is None:
            self._committed, self._messages = self._messages, []
            return
        for each in self._messages:
            if each.transaction is nested:
                each.transaction = nested.parent
            if each.row_in is nested:
                each.row_in = nested.parent

    def after_transaction_end(self, ended: SessionTransaction) -> None:
        # What a commit has not handed on by now was rolled back.
        self._messages = [each for each in self._messages if each.transaction is not ended]
        for each in self._messages:
            if each.row_in is ended:
                each.row = each.row_in = None
        if ended.parent is None and self._committed:
            committed, self._committed = self._committed, []
            _wait_for(_send(committed))


# For all sessions: to listen to each would cost more than all that follows.
@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    if (pending := session.info.get(_KEY)) is not None:
        pending.before_commit(session)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    if (pending := session.info.get(_KEY)) is not None:
        pending.after_commit(session)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, ended: SessionTransaction) -> None:
    if (pending := session.info.get(_KEY)) is not None:
        pending.after_transaction_end(ended)


def _wait_for(sending: Coroutine[Any, Any, None]) -> None:
    if in_greenlet():  # of an AsyncSession
        await_only(sending)
    else:
        bridge.run(sending)


async def _send(messages: list[_Message]) -> None:
    for app in {each.app for each in messages if each.row is not None}:
        its = [each for each in messages if each.app is app and each.row is not None]
        age = time.monotonic() - min(each.inserted for each in its)
        await relay.send(app, [each.row for each in its if each.row is not None], age)
    direct = [each for each in messages if each.row is None]
    if len(direct) == 1:
        await publish.aapply_async(direct[0].signature)
    elif direct:
        await publish.publish_many(each.signature for each in direct)
