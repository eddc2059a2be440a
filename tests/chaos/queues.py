"""A queue that the workers and their client have to declare alike."""

import json
from collections.abc import Mapping
from typing import Any

from kombu.entity import Exchange, Queue


def queues(name: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Celery's options for a default queue with arguments that no setting has, where given."""
    if "QUEUE_ARGUMENTS" not in env:
        return {}
    arguments = json.loads(env["QUEUE_ARGUMENTS"])
    queue: Any = Queue  # neither is typed
    exchange: Any = Exchange
    return {"task_queues": [queue(name, exchange(name), name, queue_arguments=arguments)]}
