"""The routes of the status of tasks, as `celeriac.fastapi.status_router` has them.

The same answers, but for WebSockets, which WSGI does not have: the browser's client takes
server-sent events instead.
"""

import asyncio
import json
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar

from flask import Blueprint, Response, current_app, jsonify, request, send_file
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from werkzeug.exceptions import abort

from celeriac import dead
from celeriac.errors import DeadLetterError, ServiceError, UnknownTaskError
from celeriac.flask.extension import place_of
from celeriac.flask.owners import OwnerPolicy, checked
from celeriac.flask.reads import Reads
from celeriac.status import Event, Status
from celeriac.web import STATIC, telling
from celeriac.web.origins import REFUSED, SAFE_METHODS, same_origin
from celeriac.web.owners import PUBLIC, Access, Owner, ReadTokens, may_see
from celeriac.web.shown import (
    LARGEST_NUMBER,
    LONGEST_WAIT,
    NO_DEAD_LETTER,
    NOT_CANCELLED,
    PAGE,
    TO_ALL,
    TRY_AGAIN,
    UNKNOWN,
    TaskId,
    TaskList,
    described,
    matches,
    shown,
    tag_of,
    tags_in,
    too_many,
)

T = TypeVar("T")

_TASK_ID: TypeAdapter[str] = TypeAdapter(TaskId)
_NUMBER: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=0, le=LARGEST_NUMBER)])
_SECONDS: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(ge=0, le=LONGEST_WAIT)])
_LIMIT: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1, le=100)])
_BEFORE: TypeAdapter[str] = TypeAdapter(Annotated[str, Field(pattern=PAGE)])


def status_blueprint(
    *,
    owner: OwnerPolicy,
    origins: Collection[str] = (),
    unowned: bool = False,
    errors: bool = False,
    tokens: ReadTokens | None = None,
    streams: int = 8,
    name: str = "tasks",
) -> Blueprint:
    """Everything about tasks over HTTP and server-sent events: see docs/howto/flask.md.

    `owner` is called in a request and says whose tasks it may see, such as `public`; of any other's
    it is told, byte for byte, what is told of an unknown one. Pages of other sites may change
    nothing, except those of `origins`. `unowned`, `errors` and `tokens` are those of
    `celeriac.fastapi.status_router`. So many `streams` and long polls may be open in one process of
    one owner, or of one address: each takes a thread of the server's.
    """
    text = partial(_as_text, errors=errors)
    desk = _Desk(owner, unowned=unowned, tokens=tokens, most=streams)
    blueprint = Blueprint(name, __name__)

    @blueprint.before_request
    def refuse_other_sites() -> Response | None:
        if request.method in SAFE_METHODS or same_origin(request.headers, origins):
            return None
        _refuse(403, REFUSED)

    @blueprint.get("/tasks/<task_id>")
    def get_task(task_id: str) -> Response:
        """The state now. With `wait`, in seconds: the one after `If-None-Match`, or the last."""
        access = desk.access(by_token=True)
        task, seen = desk.find(task_id, access), tags_in(request.headers.get("If-None-Match"))
        seconds = _query("wait", _SECONDS) or 0.0
        task = desk.wait(task, access, seconds, seen) if seconds else desk.hinted(task)
        tag = {"ETag": tag_of(task)}
        if matches(task, seen):
            return desk.open_to(access, Response(status=304, headers=tag))
        found = _answer(described(task, errors=errors))
        found.headers.update(tag | {"Cache-Control": "no-cache"})
        return desk.open_to(access, found)

    @blueprint.get("/tasks")
    def list_tasks() -> Response:
        """The owner's recent tasks, the newest first."""
        who = checked(owner())
        before, limit = _query("before", _BEFORE), _query("limit", _LIMIT) or 20
        if who is PUBLIC:
            return _answer(TaskList(tasks=[]))  # nobody's are listed
        found, following = _reads().call(lambda reader: reader.recent(str(who), limit, before))
        tasks = [described(each, errors=errors) for each in found]
        return _answer(TaskList(tasks=tasks, next=following))

    @blueprint.delete("/tasks/<task_id>")
    def cancel_task(task_id: str) -> Response:
        """Cancel: what waits never starts, what runs is told to stop."""
        task = desk.find(task_id, desk.access())
        try:
            task = _reads().call(lambda reader: reader.cancel(task.task_id))
        except UnknownTaskError:
            _refuse(404, UNKNOWN)
        except ServiceError:
            _refuse(503, NOT_CANCELLED, TRY_AGAIN)
        return _answer(described(task, errors=errors), 202)

    @blueprint.post("/tasks/<task_id>/retry")
    def retry_task(task_id: str) -> Response:
        """Send a dead letter again, as a new task."""
        task = desk.find(task_id, desk.access())
        try:
            new = dead.send_anew(place_of(current_app).celery, task.task_id)
        except DeadLetterError:
            _refuse(409, NO_DEAD_LETTER)
        sent = _reads().call(lambda reader: reader.snapshot(new))
        return _answer(described(sent, errors=errors), 202)

    @blueprint.get("/tasks/<task_id>/events")
    def task_events(task_id: str) -> Response:
        """What happens from now on, or after `Last-Event-ID`, to the end, as server-sent events."""
        access = desk.access(by_token=True)
        task = desk.find(task_id, access)
        last = request.headers.get("Last-Event-ID")
        after = _query("after", _NUMBER)
        if last is not None:
            after = _valid(_NUMBER, last, "header", "last-event-id")
        if task.terminal and task.id is not None and after is not None and after >= task.id:
            return desk.open_to(access, Response(status=204))  # ends an EventSource for good
        done = desk.count(access)
        told = _reads().told(task.task_id, after)
        stream = Response(map(text, told), mimetype="text/event-stream")
        stream.call_on_close(told.close)
        stream.call_on_close(done)
        stream.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return desk.open_to(access, stream)

    @blueprint.get("/celeriac/client.js")
    def client() -> Response:
        """The browser's side of all this, an ES module."""
        found = send_file(STATIC / "client.js", mimetype="text/javascript")
        found.headers.update(TO_ALL)
        return found

    if tokens is not None:

        @blueprint.route("/tasks/<task_id>", methods=["OPTIONS"])
        def allow_if_none_match(task_id: str) -> Response:
            """A browser asks before a page of another origin may send that, as long polls do."""
            return Response(
                status=204, headers=TO_ALL | {"Access-Control-Allow-Headers": "If-None-Match"}
            )

    return blueprint


def find_task(task_id: str, owner: Owner, *, unowned: bool = False) -> Status:
    """The state of a task, in a view, if `owner`, as a policy gives it, may see it.

    404 else, the same for a task that is not known and for somebody else's. `unowned`: as in
    `status_blueprint`. Raises ServiceError, which is a 503, where the status store is away.
    """
    checked(owner)
    return _find(task_id, lambda found: may_see(owner, found.record, unowned=unowned), {})


def _find(task_id: str, allows: Callable[[Status], bool], headers: Mapping[str, str]) -> Status:
    task_id = _valid(_TASK_ID, task_id, "path", "task_id")
    found: Status | None = None
    with suppress(UnknownTaskError):
        found = _reads().call(lambda reader: reader.snapshot(task_id))
    if found is None or not allows(found):
        _refuse(404, UNKNOWN, headers)
    return found


class _Desk:
    """Who may see what, how much of it at once, and what is told."""

    def __init__(
        self, owner: OwnerPolicy, *, unowned: bool, tokens: ReadTokens | None, most: int
    ) -> None:
        self._owner, self._unowned = owner, unowned
        self._tokens, self._most = tokens, most

    def access(self, *, by_token: bool = False) -> Access:
        """What a token says is all that counts of who has one: a cookie adds nothing to it."""
        token = request.args.get("token") if by_token and self._tokens is not None else None
        if token is not None and self._tokens is not None:
            return self._tokens.access(token) or Access(by_token=True)
        return Access(checked(self._owner()), unowned=self._unowned)

    def open_to(self, access: Access, answer: Response) -> Response:
        """Let pages of other origins read what was asked for with a token."""
        if access.by_token:
            answer.headers.update(TO_ALL)
        return answer

    def find(self, task_id: str, access: Access) -> Status:
        allows = lambda found: access.allows(found.task_id, found.record)  # noqa: E731
        return _find(task_id, allows, TO_ALL if access.by_token else {})

    def hinted(self, task: Status) -> Status:
        return _reads().call(lambda reader: reader.with_hint(task))

    def wait(self, task: Status, access: Access, seconds: float, seen: Collection[str]) -> Status:
        done = self.count(access)
        try:
            waited = _reads().wait(
                lambda reader: telling.wait(reader, task, asyncio.timeout(seconds), seen)
            )
        finally:
            done()
        return self.hinted(task if waited is None else waited)

    def count(self, access: Access) -> Callable[[], None]:
        """Count a stream, or a long poll, until what this gives is called; 429 for one too many."""
        who: Hashable = access
        if access.owner in ("", PUBLIC) and not access.by_token:
            who = request.remote_addr
        done = _reads().count(who, self._most)
        if done is None:
            _refuse(429, too_many(self._most), TO_ALL if access.by_token else {})
        return done


def _reads() -> Reads:
    return place_of(current_app).reads


def _as_text(event: Status | Event | None, *, errors: bool) -> str:
    if event is None:
        return ": still there\n\n"
    number = "" if event.id is None else f"id: {event.id}\n"
    return f"{number}data: {json.dumps(shown(event, errors=errors))}\n\n"


def _answer(found: BaseModel, status: int = 200) -> Response:
    text = found.model_dump_json(exclude_none=True)
    return Response(text, status, mimetype="application/json")


def _refuse(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> NoReturn:
    answer = jsonify(detail=detail)
    answer.status_code = status
    answer.headers.update(headers or {})
    abort(answer)


def _query(name: str, kind: TypeAdapter[T]) -> T | None:
    text = request.args.get(name)
    return None if text is None else _valid(kind, text, "query", name)


def _valid(kind: TypeAdapter[T], text: str, where: str, name: str) -> T:
    """422 where it is not, in FastAPI's words."""
    try:
        return kind.validate_python(text)
    except ValidationError as error:
        found = error.errors(include_url=False)
        _refuse(422, [each | {"loc": [where, name]} for each in found])
