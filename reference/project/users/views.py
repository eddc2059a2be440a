from typing import Any

from fastapi import APIRouter, HTTPException, Request, status
from fastapi.responses import HTMLResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from celeriac.fastapi import IdempotencyDep, shown_error
from project import third_party
from project.deps import AsyncSessionDep, ConfigDep, SessionDep
from project.pages import render
from project.users.models import User
from project.users.schemas import Refusal, TaskAccepted, TaskState, UserIn, UserOut
from project.users.tasks import process_notification, subscribe_to_list, subscribe_user
from project.visitors import OwnTasks, TaskDep

router = APIRouter(prefix="/users", tags=["users"])

TAKEN = "a user with this name or address exists already"


def _also(code: int, description: str) -> dict[int | str, dict[str, Any]]:
    """For the documentation: what else a route answers."""
    return {code: {"model": Refusal, "description": description}}


_AWAY = _also(503, "The task queue or the status store is away: try again later")
_UNREADABLE = _also(400, "The body is no text")


@router.post("/", status_code=status.HTTP_201_CREATED, responses=_UNREADABLE | _also(409, TAKEN))
def create_user(body: UserIn, session: SessionDep) -> UserOut:
    user = User(**body.model_dump())
    session.add(user)
    try:
        session.commit()
    except IntegrityError:  # of two at the same moment, the database lets one in
        raise HTTPException(status.HTTP_409_CONFLICT, TAKEN) from None
    return UserOut.model_validate(user)


@router.post(
    "/user_subscribe/",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[OwnTasks],
    responses=_UNREADABLE | _also(409, TAKEN),
)
async def subscribe(body: UserIn, session: AsyncSessionDep) -> TaskAccepted:
    """A user and the task about it: both, or neither. The task always finds its user."""
    user = User(**body.model_dump())
    session.add(user)
    try:
        await session.flush()  # which gives it its id
        task = subscribe_user.delay_on_commit(session, user.id)
        await session.commit()
    except IntegrityError:
        raise HTTPException(status.HTTP_409_CONFLICT, TAKEN) from None
    return TaskAccepted(task_id=task.id)


@router.get("/")
async def list_users(session: AsyncSessionDep) -> list[UserOut]:
    users = await session.scalars(select(User).order_by(User.id).limit(100))
    return [UserOut.model_validate(user) for user in users]


@router.get("/form/", response_class=HTMLResponse, include_in_schema=False)
async def form_page(request: Request) -> HTMLResponse:
    return render(request, "users/form.html")


@router.get("/form_ws/", response_class=HTMLResponse, include_in_schema=False)
async def form_ws_page(request: Request) -> HTMLResponse:
    return render(request, "users/form_ws.html")


@router.post("/form/", dependencies=[OwnTasks], responses=_UNREADABLE | _AWAY)
async def submit_form(body: UserIn, idempotency: IdempotencyDep) -> TaskAccepted:
    """Twice with one `Idempotency-Key` is one task."""
    task = await idempotency.send(subscribe_to_list.s(body.email))
    return TaskAccepted(task_id=task.id)


@router.get(
    "/task_status/",
    response_model_exclude_none=True,
    responses=_AWAY | _also(404, "Unknown, or not yours"),
)
async def task_status(task: TaskDep, config: ConfigDep) -> TaskState:
    return TaskState(state=task.state, error=shown_error(task, errors=config.shows_errors))


@router.post("/webhook_test/", responses=_also(502, "The third party fails"))
async def webhook_test() -> str:
    """The blocking way: the caller waits for the third party, and sees its failure."""
    try:
        await third_party.subscribe("webhook@example.com")
    except third_party.ThirdPartyError as error:
        raise HTTPException(status.HTTP_502_BAD_GATEWAY, str(error)) from error
    return "pong"


@router.post("/webhook_test_async/", responses=_AWAY)
async def webhook_test_async() -> str:
    """The same as a task: the answer is there at once, the call is made and made again."""
    await process_notification.adelay()
    return "pong"
