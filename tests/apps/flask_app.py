"""A worker whose tasks belong to a Flask application with a database.

Those whose names end in `_sync` have synchronous bodies and do the same.
"""

import asyncio
import os
import time
from typing import Any

from celery import Task
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy
from redis import Redis
from sqlalchemy import select, text

from celeriac.flask import Celeriac
from celeriac.store import redis_url

extension = Celeriac()
db: Any = SQLAlchemy()
notes = Redis.from_url(redis_url(os.environ["BACKEND"]))


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(
        GREETING="hello",
        SQLALCHEMY_DATABASE_URI="sqlite://",
        CELERY={
            "broker_url": os.environ["BROKER"],
            "result_backend": os.environ["BACKEND"],
            "worker_pool": os.environ.get("WORKER_POOL", "prefork"),
            "task_create_missing_queues": True,
        },
    )

    @app.teardown_appcontext
    def tell(error: BaseException | None) -> None:
        """Called last, since it comes first here: whether the session is still held."""
        if (key := g.get("key")) is not None:
            notes.rpush(f"note:{key}", f"{type(error).__name__} {db.session.registry.has()}")

    db.init_app(app)
    extension.init_app(app)
    return app


def used() -> str:
    """The application's configuration, in its context, and whether `g` and the session are new."""
    fresh = not g.get("used") and not db.session.registry.has()
    g.used = True
    db.session.execute(text("SELECT 1"))
    return f"{current_app.config['GREETING']} {fresh}"


@extension.task
async def greet() -> list[str]:
    found = used()
    await asyncio.sleep(0.02)  # others have their turn
    return [found, current_app.config["GREETING"], str(g.used)]


@extension.task
def greet_sync() -> list[str]:
    found = used()
    time.sleep(0.02)
    return [found, current_app.config["GREETING"], str(g.used)]


@extension.task
async def nest() -> list[list[str]]:
    """Another task, called as a function, and run where it is called."""
    used()
    g.marked = True
    eager = await asyncio.to_thread(greet_sync.apply)
    return [await greet(), eager.result, [str(g.marked)]]


@extension.task
def nest_sync() -> list[list[str]]:
    used()
    g.marked = True
    return [greet_sync(), greet_sync.apply().result, [str(g.marked)]]


def use_and_end(task: Task, key: str, how: str) -> None:
    g.key = key
    db.session.scalar(select(1))
    if how == "error":
        raise ValueError(how)
    if how == "retry":
        raise task.retry(countdown=0)


@extension.task(bind=True, max_retries=1)
async def end(self: Task, key: str, how: str) -> None:
    use_and_end(self, key, how)
    if how == "cancel":
        notes.rpush("note:runs", "yes")
        await asyncio.sleep(60)


@extension.task(bind=True, max_retries=1)
def end_sync(self: Task, key: str, how: str) -> None:
    use_and_end(self, key, how)


app = create_app()
celery = app.extensions["celery"]
