"""The feature's tasks, and four ways to try again.

Only TemporaryError is tried again: a programming error fails at once, however often it is called.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from celery import Task
from celery.utils.log import get_task_logger
from sqlalchemy import func, select

from celeriac import shared_task
from celeriac.inject import injected
from project.deps import AsyncSessionDep, SessionDep
from project.third_party import TemporaryError, subscribe
from project.users.models import User

logger = get_task_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@shared_task
def divide(x: float, y: float) -> float:
    logger.info("dividing %s by %s", x, y)
    return x / y


@shared_task
async def subscribe_to_list(email: str) -> str:
    """The form's task: one call, no second try; its failure is what the page shows."""
    await subscribe(email)
    return f"{email} is on the list"


@shared_task
async def subscribe_user(user_id: int, session: AsyncSessionDep = injected) -> str:
    """Published when its user is committed, so the user is there."""
    user = await session.get_one(User, user_id)
    return await subscribe_to_list(user.email)


# 1. By hand: the task decides when, and after what.
@shared_task(bind=True, max_retries=3)
async def process_notification(self: Task, email: str = "webhook@example.com") -> str:
    try:
        await subscribe(email)
    except TemporaryError as error:
        raise self.retry(exc=error, countdown=5) from error
    return "delivered"


# 2. By declaration: waits of 1, 2, 4 … 60 s, each shortened by chance so that they do not align.
@shared_task(autoretry_for=(TemporaryError,), max_retries=5, retry_backoff=1, retry_backoff_max=60)
async def subscribe_with_backoff(email: str) -> str:
    await subscribe(email)
    return "delivered"


# 3. By inheritance: many tasks, one policy.
class ThirdPartyTask(Task):  # type: ignore[misc]
    autoretry_for = (TemporaryError,)
    max_retries = 5
    retry_backoff = 1
    retry_backoff_max = 60
    retry_jitter = True


@shared_task(base=ThirdPartyTask, name="high_priority:subscribe_now")
async def subscribe_now(email: str) -> str:
    await subscribe(email)
    return "delivered"


# 4. By decorator: where the error is known only to the function that it wraps.
def retrying(
    *errors: type[Exception], countdown: float, max_retries: int
) -> Callable[[Callable[P, Awaitable[R]]], Callable[..., Awaitable[R]]]:
    """Run the function as a bound task that tries again after `errors`."""

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[..., Awaitable[R]]:
        @wraps(function)
        async def run(self: Task, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return await function(*args, **kwargs)
            except errors as error:
                raise self.retry(exc=error, countdown=countdown, max_retries=max_retries) from error

        return run

    return decorate


@shared_task(bind=True, name="low_priority:subscribe_someday")
@retrying(TemporaryError, countdown=30, max_retries=10)
async def subscribe_someday(email: str) -> str:
    await subscribe(email)
    return "delivered"


@shared_task(ignore_result=True)
def count_users(session: SessionDep = injected) -> None:
    """Every five seconds, by beat."""
    logger.info("%d users", session.scalar(select(func.count()).select_from(User)))


@shared_task(name="low_priority:nightly_report")
def nightly_report(session: SessionDep = injected) -> dict[str, Any]:
    """Every night at three, by beat: how many users each mail domain has."""
    domains: dict[str, int] = {}
    for email in session.scalars(select(User.email)):
        domain = email.rpartition("@")[2]
        domains[domain] = domains.get(domain, 0) + 1
    return {"users": sum(domains.values()), "domains": domains}
