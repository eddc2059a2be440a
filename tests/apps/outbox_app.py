"""Tasks that are counted, and processes that publish them on commit.

`python outbox_app.py COUNT` commits that often and says each id; with `die` it is killed after the
last commit, before anything is sent.
"""

import os
import signal
import sys
from typing import Any

from celery import Celery
from redis import Redis
from sqlalchemy import MetaData
from sqlalchemy.orm import Session

import celeriac
from celeriac import relay
from celeriac.database import Database
from celeriac.outbox import outbox_table, use_outbox
from celeriac.store import redis_url

celery = Celery("outbox_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
celery.conf.update(
    {"task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1}
)
if queue := os.environ.get("QUEUE"):
    celery.conf.task_default_queue = queue
if pool := os.environ.get("WORKER_POOL"):
    celery.conf.worker_pool = pool
celeriac.adopt(celery, lease=2)
database = Database(os.environ["DATABASE_URL"])
use_outbox(celery, database, relayed="RELAYED" in os.environ)
metadata = MetaData()
outbox_table(metadata)
client = Redis.from_url(redis_url(os.environ["BACKEND"]))


@celery.task(bind=True)
def count(self: Any, value: int) -> int:
    client.rpush("runs", self.request.id)
    client.rpush("values", value)
    return value


@celery.task
def add(x: int, y: int) -> int:
    client.rpush("runs", "add")
    return x + y


@celery.task
def total(values: list[int]) -> int:
    client.rpush("runs", "total")
    return sum(values)


async def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    number, dies = int(sys.argv[1]), "die" in sys.argv
    for value in range(number):
        with Session(database.engine) as session:
            sent = count.delay_on_commit(session, value)
            print(sent.id, flush=True)
            if dies and value == number - 1:
                relay.send = _die  # type: ignore[assignment]
            session.commit()


if __name__ == "__main__":
    main()
