"""Queues: a task named `queue:name` goes to that queue, every other one to the default."""

from typing import Any

from celery import Celery, current_app
from celery.exceptions import QueueNotFound

from celeriac import ConfigurationError


def route_task(
    name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None, **_: Any
) -> dict[str, str] | None:
    """Celery's router. Raises ConfigurationError for a prefix that is no queue."""
    queue, colon, _name = name.partition(":")
    if not colon:
        return None
    app: Celery = task.app if task is not None else current_app
    if queue not in app.amqp.queues:
        listed = ", ".join(sorted(app.amqp.queues))
        raise ConfigurationError(f"task {name!r}: {queue!r} is no queue; there are {listed}")
    return {"queue": queue}


def check(celery: Celery) -> None:
    """Refuse at start what would fail when the task is called."""
    for name, task in celery.tasks.items():
        try:
            celery.amqp.router.route({}, name, (), {}, task)
        except QueueNotFound as error:
            raise ConfigurationError(f"task {name!r}: {error.args[0]}") from error
    for name, entry in celery.conf.beat_schedule.items():
        queue = entry.get("options", {}).get("queue")
        if queue is not None and queue not in celery.amqp.queues:
            listed = ", ".join(sorted(celery.amqp.queues))
            raise ConfigurationError(
                f"schedule {name!r}: {queue!r} is no queue; there are {listed}"
            )
