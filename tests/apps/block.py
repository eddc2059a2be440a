"""A synchronous task that takes long, for workers of the reference system."""

import time

from celery import shared_task


@shared_task(name="high_priority:block")
def block(_: str) -> None:
    time.sleep(5)
