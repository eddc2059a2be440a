"""Log lines carry the task's id and the id of the request that sent it, as text or as JSON."""

import logging
from typing import Any

from asgi_correlation_id.context import correlation_id
from celery import Celery, Task, current_task
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    before_task_publish,
    task_prerun,
)
from pythonjsonlogger.json import JsonFormatter

from project.config import Config

_HEADER = "request_id"
_FIELDS = "%(asctime)s %(levelname)s %(processName)s %(name)s %(message)s"
_TEXT = (
    "[%(asctime)s: %(levelname)s/%(processName)s] "
    "[task %(task_id)s request %(correlation_id)s] %(name)s: %(message)s"
)

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), 127, 133, 0x2028, 0x2029)}


class _ContextFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        task_id = current_task.request.id if current_task else None
        if task_id is None and isinstance(record.args, dict):
            task_id = record.args.get("id")  # the worker's own "received" and "succeeded"
        record.task_id = task_id or "-"
        record.correlation_id = correlation_id.get() or "-"
        return True


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # What a task was sent cannot write a line of its own into the log.
        record.message = record.message.translate(_ESCAPES)
        return super().formatMessage(record)


def _formatter(config: Config) -> logging.Formatter:
    if config.log_format == "json":
        return JsonFormatter(f"{_FIELDS} %(task_id)s %(correlation_id)s")
    return _TextFormatter(_TEXT)


def _dress(logger: logging.Logger, config: Config) -> None:
    for handler in logger.handlers:
        handler.setFormatter(_formatter(config))
        handler.filters[:] = [_ContextFilter()]


def set_up_web(config: Config) -> None:
    """Once in a process that has no handlers yet: a test runner's, or a host's, stay."""
    logger = logging.getLogger("project")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    _dress(logger, config)


def set_up_worker(celery: Celery, config: Config) -> None:
    """Celery sets its loggers up when a worker starts; they are dressed then."""

    def dress(logger: logging.Logger, **_: Any) -> None:
        _dress(logger, config)

    after_setup_logger.connect(dress, weak=False, dispatch_uid="project.logs")
    after_setup_task_logger.connect(dress, weak=False, dispatch_uid="project.logs.task")
    before_task_publish.connect(_send_request_id, dispatch_uid="project.logs.publish")
    task_prerun.connect(_receive_request_id, dispatch_uid="project.logs.prerun")


def _send_request_id(headers: dict[str, Any], **_: Any) -> None:
    if (request_id := correlation_id.get()) is not None:
        headers.setdefault(_HEADER, request_id)


def _receive_request_id(task: Task, **_: Any) -> None:
    if not task.request.is_eager:  # an eager task runs inside the request itself
        correlation_id.set(task.request.get(_HEADER))
