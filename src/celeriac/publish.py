"""Publish from a coroutine: Celery's own message, sent without blocking the event loop."""

import asyncio
from contextvars import copy_context
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import celery
from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult
from celery.utils import uuid
from kombu.exceptions import OperationalError

from celeriac import bridge, producer
from celeriac.errors import PublishError

_TIMEOUT = 2.0  # seconds
_timeouts: WeakKeyDictionary[Celery, float] = WeakKeyDictionary()


async def adelay(task: Any, /, *args: Any, **kwargs: Any) -> Any:
    return await aapply_async(task, args, kwargs)


async def aapply_async(
    task: celery.Task | Signature,
    args: Any = None,
    kwargs: Any = None,
    *,
    publish_timeout: float | None = None,
    **options: Any,
) -> AsyncResult:
    app = task.app
    if options.get("task_id") is None:
        options["task_id"] = uuid()
    return await _publish(app, task.apply_async, args, kwargs, options, publish_timeout)


async def _publish(app, function, args, kwargs, options, timeout):
    try:
        link = producer.loops.find(app)
    except KeyError:
        link = await producer.loops.make(app)
    if timeout is None:
        timeout = _timeouts.get(app, _TIMEOUT)
    context = copy_context()
    context.run(producer.deadline.set, asyncio.get_running_loop().time() + timeout)
    options["producer"] = link.producer
    options.setdefault("event_dispatcher", link.dispatcher)
    try:
        return await bridge.Hosted(partial(function, args, kwargs, **options)).run(context)
    except PublishError as error:
        error.task_id = options["task_id"]
        raise
    except OperationalError as error:
        raise PublishError(str(error), task_id=options["task_id"]) from error
