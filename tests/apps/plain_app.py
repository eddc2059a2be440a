"""A worker without the library."""

import os
import time

from celery import Celery

celery = Celery("plain_app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])


@celery.task
def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"
