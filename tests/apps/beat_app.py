"""A schedule for beats; the environment says which. Its tasks are sent and run nowhere here."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.beat import BeatLazyFunc
from celery.schedules import crontab

import celeriac
from celeriac.settings import Settings


class Config(Settings):
    celery_broker_url: str = os.environ["BROKER"]
    celery_result_backend: str = os.environ["BACKEND"]
    beat_lease: float = float(os.environ.get("LEASE", "2"))


def pause_once() -> str:
    """Stop this process, as a paused machine does, where the test asks for it."""
    flag = Path(os.environ["PAUSE"])
    if flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
    return "paused"


def entry(name: str, every: Any, **more: Any) -> dict[str, Any]:
    who_and_when: tuple[Any, ...] = (BeatLazyFunc(os.getpid), BeatLazyFunc(time.time))
    if more.pop("pauses", False):
        who_and_when += (BeatLazyFunc(pause_once),)
    if more.pop("unreadable", False):
        who_and_when += (object(),)
    if isinstance(every, dict):
        every = crontab(**every)
    return {"task": name, "schedule": every, "args": who_and_when} | more


celery: Celery = celeriac.create_celery(
    Config(),
    name="beat_app",
    beat_schedule={
        name: entry(name, **options) for name, options in json.loads(os.environ["SCHEDULE"]).items()
    },
    **json.loads(os.environ.get("CONF", "{}")),
)
