"""Live states as they are commonly added to Celery: a signal, and the broadcaster library.

The handler connects, publishes and disconnects for each task, on an event loop made for it, as the
tutorials and projects do that can be found.
"""

import json
import time
from typing import Any

from asgiref.sync import async_to_sync
from broadcaster import Broadcast
from celery import Celery
from celery.result import AsyncResult
from celery.signals import task_postrun

from benchmarks.body import URL

app = Celery("bench", broker=URL, backend=URL)
app.conf.task_acks_late = True
broadcast = Broadcast(URL)


@app.task
def timed(seconds: float) -> int:
    time.sleep(seconds)
    return time.monotonic_ns()


async def start(task: str, seconds: float) -> str:
    return str(timed.delay(seconds).id)


def state_of(task_id: str) -> dict[str, Any]:
    found = AsyncResult(task_id, app=app)
    return {"task_id": task_id, "state": found.state, "result": found.result}


async def tell(task_id: str) -> None:
    await broadcast.connect()
    await broadcast.publish(channel=task_id, message=json.dumps(state_of(task_id)))
    await broadcast.disconnect()


@task_postrun.connect
def tell_of_end(task_id: str, **_: Any) -> None:
    async_to_sync(tell)(task_id)
