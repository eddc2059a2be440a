"""Good and bad uses of typed tasks; `# E` marks each line that mypy shall refuse, and no other."""

from typing import Annotated, assert_type

from celery import Celery
from fastapi import Depends

from celeriac import adopt, create_celery, shared_task
from celeriac.inject import injected
from celeriac.settings import Settings
from celeriac.task import Task

app = adopt(Celery("typed"))
made = create_celery(Settings())


@app.task
def divide(x: float, y: float = 1.0) -> float:
    return x / y


@app.task(name="other", ignore_result=True)
async def fetch(url: str, *, retries: int) -> bytes:
    return url.encode() * retries


@made.task(bind=True, max_retries=3)
def again(self: Task, number: int) -> int:
    self.retry(countdown=number)
    return number


@shared_task
def shared(name: str) -> str:
    return name


@shared_task(bind=True)
async def shared_and_bound(self: Task, name: str) -> str:
    return name


@app.task
async def counted(unit: str, limit: Annotated[int, Depends(int)] = injected) -> int:
    return limit


async def good() -> None:
    await counted.adelay("m")
    await counted.adelay("m", limit=1)
    await divide.adelay(1, y=2)
    divide.delay(1)
    assert_type(divide(1, 2), float)
    assert_type(await fetch("a", retries=1), bytes)
    await fetch.adelay("a", retries=1)
    await again.adelay(1)
    await again.aapply_async((1,), publish_timeout=1.0, queue="other")
    await shared.adelay("x")
    await shared_and_bound.adelay(name="x")
    divide.s(1) | divide.s()
    divide.max_retries = 5


async def bad() -> None:
    await counted.adelay()  # E
    await counted.adelay("m", limit="1")  # E
    await divide.adelay("1")  # E
    await divide.adelay()  # E
    await divide.adelay(1, 2, 3)  # E
    divide.delay(z=1)  # E
    await fetch.adelay("a")  # E
    fetch.delay("a", 1)  # E
    await again.adelay("1")  # E
    await again.adelay(Task(), 1)  # E
    await again.aapply_async((1,), publish_timeout="1")  # E
    await shared.adelay(1)  # E
    shared.delay()  # E
    await shared_and_bound.adelay(1)  # E
    divide.si("x")  # E
