"""The events that monitors read: more of a busy worker's in one message than Celery sends."""

from typing import Any

from celery import Celery
from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher

# Celery's are 24. A turn of the worker's main loop makes several hundred, and sends what there is
# when it ends: nobody sees them later, and each message costs more than a dozen events do.
_AT_ONCE = 240


class Dispatcher(EventDispatcher):  # type: ignore[misc]
    """Celery's, with a larger buffer."""

    def __init__(self, *args: Any, buffer_limit: int = _AT_ONCE, **options: Any) -> None:
        super().__init__(*args, buffer_limit=buffer_limit, **options)


def use_dispatcher(app: Celery) -> None:
    """Have `app` send its events so, unless it has a dispatcher of its own."""
    if app.events.dispatcher_cls == Events.dispatcher_cls:
        app.events.dispatcher_cls = f"{__name__}:{Dispatcher.__name__}"
