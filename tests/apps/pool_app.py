"""Tasks that show what a worker's pool does; the environment says which pool and broker."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import cache

from celery import Celery, Task, chord, group, signals
from celery.exceptions import SoftTimeLimitExceeded
from redis import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import celeriac
from celeriac.store import redis_url

notes = Redis.from_url(redis_url(os.environ.get("NOTES") or os.environ["BACKEND"]))


def note(key: str, value: object) -> None:
    """Something that the test shall see."""
    notes.rpush(f"note:{key}", str(value))


@asynccontextmanager
async def lifespan(app: Celery) -> AsyncIterator[None]:
    if reason := os.environ.get("FAIL_AT_START"):
        raise RuntimeError(reason)
    note("lifespan", f"entered {os.getpid()} {id(asyncio.get_running_loop())}")
    yield
    await asyncio.sleep(0.01)
    note("lifespan", f"left {os.getpid()}")


celery = celeriac.adopt(
    Celery("pool_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"]),
    lifespan=lifespan if "LIFESPAN" in os.environ else None,
    lease=float(os.environ.get("LEASE", "30")),
)
if "WORKER_POOL" in os.environ:
    celery.conf.worker_pool = os.environ["WORKER_POOL"]
celery.conf.update(json.loads(os.environ.get("CONF", "{}")))


@celery.task
async def wait(seconds: float, key: str = "wait") -> str:
    note(f"{key}-started", seconds)
    try:
        await asyncio.sleep(seconds)
    except BaseException as error:
        await asyncio.sleep(0.01)
        note(f"{key}-ended", type(error).__name__)
        raise
    note(f"{key}-ended", "returned")
    return "waited"


@celery.task
async def stubborn() -> str:
    """Catches its cancellation and goes on to an end of its own."""
    try:
        note("stubborn", "started")
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        note("stubborn", "caught")
    return "finished all the same"


@celery.task
def block(seconds: float) -> str:
    note("block-started", seconds)
    time.sleep(seconds)
    return "blocked"


@celery.task
async def block_loop(seconds: float) -> str:
    note("block_loop-started", seconds)
    time.sleep(seconds)  # noqa: ASYNC251 (what the watch is there for)
    return "blocked"


@celery.task(time_limit=1)
async def hard() -> None:
    try:
        await asyncio.sleep(30)
    finally:
        note("hard", "cleaned up")


@celery.task(soft_time_limit=1)
async def soft() -> str:
    try:
        await asyncio.sleep(30)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0.01)
        return "in time"
    return "never"


@celery.task(time_limit=5)
def limited_and_synchronous() -> None: ...


@celery.task(bind=True)
async def send_on(self: Task, count: int) -> list[str]:
    """A body that publishes with plain `delay`, on the loop."""
    sent = [
        wait.apply_async((0,), {"key": "sent"}, queue=self.request.delivery_info["routing_key"])
    ]
    sent += [
        wait.apply_async((0,), {"key": "sent"}, queue=self.request.delivery_info["routing_key"])
        for _ in range(count - 1)
    ]
    return [result.id for result in sent]


@celery.task(bind=True)
async def start_chords(self: Task, rounds: int) -> list[str]:
    """Chords started on the loop, while others end."""
    options = {"queue": self.request.delivery_info["routing_key"]}
    header = [parents.s().set(**options) for _ in range(2)]
    started = []
    for _ in range(rounds):
        started.append(chord(header, count.s().set(**options)).apply_async().id)
        await asyncio.sleep(0.05)
    return started


@celery.task
async def hold_producers(key: str) -> None:
    """Until there is something in the list `key`."""
    with ExitStack() as held:
        for _ in range(celery.conf.broker_pool_limit):
            held.enter_context(celery.producer_pool.acquire(block=True))
        note("producers", "held")
        await asyncio.to_thread(notes.blpop, key, 30)


@celery.task(bind=True)
async def send_chords(self: Task) -> list[str]:
    """A group of chords, whose sender holds one producer and needs another."""
    to = {"queue": self.request.delivery_info["routing_key"]}
    chords = [chord([parents.s().set(**to)], count.s().set(**to)) for _ in range(2)]
    return [each.id for each in group(chords).apply_async().results]


@celery.task
async def count(values: list[object]) -> int:
    return len(values)


@celery.task(bind=True)
async def parents(self: Task) -> list[str | None]:
    return [self.request.parent_id, self.request.root_id]


@celery.task(bind=True)
async def send_child(self: Task) -> str:
    queue = self.request.delivery_info["routing_key"]
    child: str = parents.apply_async(queue=queue).id
    return child


@celery.task
async def exit_process() -> None:
    raise SystemExit(3)


@celery.task(rate_limit="2/s")
async def rated() -> float:
    return time.time()


@celery.task
async def tick(seconds: float) -> float:
    """The longest time for which the loop gave this body no turn."""
    note("tick-started", seconds)
    longest, last = 0.0, time.monotonic()
    end = last + seconds
    while last < end:
        await asyncio.sleep(0.02)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    note("tick", longest)
    return longest


@celery.task(bind=True, max_retries=3)
async def retry_three_times(self: Task) -> int:
    if self.request.retries < 3:
        raise self.retry(countdown=0)
    tries: int = self.request.retries
    return tries


@celery.task
async def exit_in_child() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    await asyncio.create_task(leave())


@celery.task
async def eager_in_run_sync() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        async with engine.connect() as connection:
            await connection.run_sync(lambda _: loop_of_this_process.apply(throw=True))
    finally:
        await engine.dispose()


@cache
def engine() -> AsyncEngine:
    """The process's one."""
    return create_async_engine(os.environ["DATABASE_URL"], pool_timeout=60)


@celery.task(bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0, retry_jitter=False)
async def query(self: Task, number: int) -> int:
    """Uses the engine twice, since the first try fails."""
    async with engine().connect() as connection:
        found: int = (await connection.execute(text("SELECT :x + 0"), {"x": number})).scalar_one()
    if self.request.retries == 0:
        raise ConnectionError
    return found


@celery.task
async def kind_of_loop() -> str:
    return type(asyncio.get_running_loop()).__module__


@celery.task
async def loop_of_this_process() -> tuple[int, int]:
    return os.getpid(), id(asyncio.get_running_loop())


ran: dict[str, list[str]] = {}


@signals.task_prerun.connect
def before(task_id: str, task: Task, **_: object) -> None:
    ran.setdefault(task_id, []).append(f"prerun {task.request.id == task_id}")


@signals.task_postrun.connect
def after(task_id: str, task: Task, state: str, **_: object) -> None:
    ran[task_id].append(f"postrun {task.request.id == task_id} {state}")
    note(f"signals-{task_id}", ran.pop(task_id))


@celery.task(acks_late=False)
async def wait_early(seconds: float, key: str = "early") -> str:
    return str(await wait.run(seconds, key))


@celery.task
def failed(request: object, error: object, _: object) -> None:
    note("errback", repr(error))


@celery.task(bind=True)
async def die(self: Task, key: str = "die") -> None:
    """Ends its process, each time it runs."""
    note(f"{key}-started", os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


if "NEWER" in os.environ:

    @celery.task
    def newer(key: str) -> str:
        """What only the workers of a newer release know."""
        note(key, "ran")
        return key


@celery.task(bind=True, max_retries=2)
def give_up(self: Task, key: str, last: int | None = None) -> None:
    """Tries again until it may not, unless the test has changed its mind."""
    note(key, self.request.retries)
    if not notes.exists(f"mended:{key}"):
        raise self.retry(exc=ConnectionError(key), countdown=0, max_retries=last)


@celery.task(
    bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0, retry_jitter=False,
    retry_kwargs={"max_retries": 1},
)  # fmt: skip
async def give_up_by_itself(self: Task, key: str) -> None:
    note(key, self.request.retries)
    if not notes.exists(f"mended:{key}"):
        raise ConnectionError(key)


@celery.task
async def fail_later(seconds: float, key: str) -> None:
    note(key, "started")
    await asyncio.sleep(seconds)
    raise ConnectionError(key)


@celery.task
def fail_at_once() -> None:
    raise ValueError("no retry")


@celery.task(bind=True, max_retries=0)
def never_again(self: Task) -> None:
    raise self.retry(exc=ConnectionError(), countdown=0)


@celery.task(bind=True, max_retries=None)
def fail_in_the_end(self: Task) -> None:
    if self.request.retries < 4:
        raise self.retry(countdown=0)
    raise ValueError("after four retries")


@celery.task
def take(*args: object, **_: object) -> None:
    """Anything."""
    note(str(args[0])[:50].encode(errors="replace").decode(), "taken")


class Last:
    """Freed when Python ends, after it has given up its signal handlers."""

    def __init__(self) -> None:
        self.write, self.sleep = os.write, time.sleep  # modules are empty by then

    def __del__(self) -> None:
        self.write(1, b"the last object\n")
        self.sleep(1)


if "SLOW_END" in os.environ:
    vars(sys)["last_of_all"] = Last()
