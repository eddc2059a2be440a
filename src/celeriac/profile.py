"""The settings that `create_celery` starts from, so that no task is lost and nothing hangs.

docs/explanation/reliability.md gives the reason of each.
"""

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from celery.app.defaults import DEFAULTS
from celery.concurrency import get_implementation, solo
from celery.signals import worker_init
from kombu.entity import Exchange, Queue

from celeriac import rabbitmq

HEARTBEAT = 3.0  # seconds
SILENCE = 5.0  # seconds without RabbitMQ's answer after which a connection is lost
SERVER_TIMEOUT = 2.0  # seconds; Celery's own defaults wait 20 s, or for ever
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL, of Docker; Kubernetes gives 30
_DAY = 86400.0

REDIS_SCHEMES = frozenset({"redis", "rediss", "redis+socket", "sentinel"})
AMQP_SCHEMES = frozenset({"amqp", "amqps", "pyamqp"})

_RELIABLE: dict[str, Any] = {
    # A task is acknowledged when it has ended: a worker that dies leaves it to another.
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "beat_scheduler": "celeriac.beat:Scheduler",  # of two beats one sends
    # What remains is for giving back what did not end in time.
    "worker_soft_shutdown_timeout": _GRACE - 2,
    # JSON only: unpickling a message runs whatever its sender wrote.
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    # Nothing waits for a dead server for ever; one retry, since a pooled connection may be stale.
    "broker_connection_timeout": SERVER_TIMEOUT,
    "broker_connection_retry_on_startup": False,  # a wrong address ends the start with one line
    "broker_connection_max_retries": None,  # later on, a worker waits for its broker for ever
    "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0, "interval_max": 0.2},
    "redis_socket_timeout": SERVER_TIMEOUT,
    "redis_socket_connect_timeout": SERVER_TIMEOUT,
    "result_expires": _DAY,
    # Flower shows what was sent, and `AsyncResult` a result's name and arguments.
    "task_send_sent_event": True,
    "result_extended": True,
}


def _keepalive_options() -> dict[int, int]:
    """A connection whose other end is gone is noticed within ten seconds, and not two hours."""
    names = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
    return {getattr(socket, name): value for name, value in names.items() if hasattr(socket, name)}


_REDIS_OPTIONS: dict[str, Any] = {
    "socket_timeout": SERVER_TIMEOUT,
    "socket_connect_timeout": SERVER_TIMEOUT,
    "socket_keepalive": True,
    "socket_keepalive_options": _keepalive_options(),
    # kombu gives up a connection that has been silent for this and one second more.
    "health_check_interval": 4,
}
_AMQP_OPTIONS: dict[str, Any] = {
    # `delay` returns when RabbitMQ has stored the message, or raises.
    "confirm_publish": True,
    # Whoever waits for an answer through a network that swallows it would wait for ever.
    "read_timeout": SILENCE,
    "write_timeout": SILENCE,
}


def reliable(config: Mapping[str, Any], max_message_size: int | None = None) -> dict[str, Any]:
    """Celery's options: those of `config`, which win, and the profile's where it has none."""
    scheme = broker_scheme(config)
    made = _RELIABLE | (_of_rabbitmq(config) if scheme in AMQP_SCHEMES else {}) | dict(config)
    made["broker_transport_options"] = _transport_options(scheme, made)
    if scheme in REDIS_SCHEMES and max_message_size is not None:
        made["broker_transport_options"].setdefault("max_message_size", max_message_size)
    if not made["result_backend"].startswith("redis+socket:"):  # a unix socket takes no such
        made.setdefault("redis_socket_keepalive", True)
    if made.get("task_queues"):
        made["task_queues"] = [_queue(queue, made) for queue in made["task_queues"]]
    return made


def broker_scheme(config: Mapping[str, Any]) -> str:
    """The first one's, of several brokers."""
    url: str = config["broker_url"]
    return urlsplit(url.split(";", maxsplit=1)[0]).scheme


def _of_rabbitmq(config: Mapping[str, Any]) -> dict[str, Any]:
    # Quorum queues have no such levels of priority: RabbitMQ refuses them.
    kind = "quorum" if config.get("task_queue_max_priority") is None else "classic"
    return {
        # A host that is gone without a word is noticed, by either side, within two of them.
        "broker_heartbeat": HEARTBEAT,
        "task_default_queue_type": kind,
        "task_create_missing_queue_type": kind,
    }


@worker_init.connect  # type: ignore[untyped-decorator]
def _beat_slowly_where_tasks_block(sender: Any, **_: Any) -> None:
    """In the solo pool nothing beats while a task runs: RabbitMQ would take it for dead."""
    config = sender.app.conf
    ours = config.broker_heartbeat is HEARTBEAT  # and nobody's on purpose
    if ours and get_implementation(sender.pool_cls) is solo.TaskPool:
        config.broker_heartbeat = DEFAULTS["broker_heartbeat"]


def has_quorum_queues(config: Mapping[str, Any]) -> bool:
    """Whether a queue that is known by its name alone is a quorum queue."""
    is_rabbitmq = broker_scheme(config) in AMQP_SCHEMES
    return is_rabbitmq and config["task_default_queue_type"] == "quorum"


def _transport_options(scheme: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("broker_transport_options") or {}
    if scheme in REDIS_SCHEMES:
        return _REDIS_OPTIONS | given
    if scheme in AMQP_SCHEMES:
        return _AMQP_OPTIONS | given
    return dict(given)


def _queue(queue: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(queue, str):
        return queue
    if has_quorum_queues(config):
        return rabbitmq.queue(queue)
    # With an exchange and a key of its own: those of the default would get every queue's messages.
    return Queue(queue, Exchange(queue), queue)  # type: ignore[no-untyped-call]
