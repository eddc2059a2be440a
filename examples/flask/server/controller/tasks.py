"""The tasks. Each runs in the application's context, in whatever worker pool."""

import time
from datetime import UTC, datetime

from flask import current_app

from celeriac.errors import PublicError
from server.core import celery


@celery.task
def long_task(seconds: float = 5.0) -> str:
    """Take a while, and give the time at which it is over."""
    longest = current_app.config.get("LONGEST_TASK", 60)
    if not 0 <= seconds <= longest:
        # Shown to whoever asks for the task; any other error stays in the worker's log.
        raise PublicError("seconds", f"seconds: expected 0 to {longest}, got {seconds:g}")
    time.sleep(seconds)
    return datetime.now(UTC).isoformat()
