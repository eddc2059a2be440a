"""What RabbitMQ says of itself and of the app's queues."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from amqp.exceptions import AccessRefused, ChannelError, NotFound, PreconditionFailed
from kombu.common import Broadcast

from celeriac import rabbitmq
from celeriac.doctor import durations
from celeriac.doctor.configuration import numbers
from celeriac.doctor.patient import TIMEOUT, Finding, Patient, Severity
from celeriac.settings import is_local, mask

_OLDEST = "3.10"  # which confirms what it hands to the dead letters
_CONSUMER_TIMEOUT = 1800.0  # seconds, where nobody has set another
_ASK = "application:get_env(rabbit, consumer_timeout)."


def reachable(patient: Patient) -> Iterator[Finding]:
    if not patient.on_rabbitmq or not isinstance(patient.rabbitmq, Exception):
        return
    error = patient.rabbitmq
    yield Finding(
        Severity.ERROR, "reachable",
        f"the broker {mask('url', patient.broker_url)} does not answer: {error or repr(error)}",
        _remedy(error, patient.broker_url),
    )  # fmt: skip


def _remedy(error: Exception, url: str) -> str:
    vhost = unquote(urlsplit(url).path[1:]) or "/"
    if isinstance(error, AccessRefused) or "ACCESS_REFUSED" in str(error):
        return "put the right user and password into its URL; guest is for its own machine alone"
    if "vhost" in str(error) or isinstance(error, NotFound):
        return f"`rabbitmqctl add_vhost {vhost}` and `rabbitmqctl set_permissions -p {vhost} …`"
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return f"it was silent for {TIMEOUT:g} s: look at the firewall, the port and the server"
    return "start it, or put the right host and port into its URL"


def server_version(patient: Patient) -> Iterator[Finding]:
    if patient.on_rabbitmq and not isinstance(patient.rabbitmq, Exception):
        version = str(_properties(patient).get("version", ""))
        if version and numbers(version) < numbers(_OLDEST):
            yield Finding(
                Severity.ERROR, "version",
                f"RabbitMQ {version} has no quorum queues that keep their dead letters for sure",
                f"RabbitMQ {_OLDEST} or newer, or task_default_queue_type='classic'",
            )  # fmt: skip


def _properties(patient: Patient) -> dict[str, Any]:
    connection: Any = patient.rabbitmq.connection
    return dict(connection.server_properties or {})


class _Found(NamedTuple):
    messages: int
    consumers: int


def _look(patient: Patient, queue: str) -> _Found | None:
    """Without making it; None where there is none."""
    channel = patient.rabbitmq.channel()
    try:
        found = channel.queue_declare(queue, passive=True)
    except NotFound:
        return None
    channel.close()
    return _Found(found.message_count, found.consumer_count)


def queues(patient: Patient) -> Iterator[Finding]:
    if not patient.on_rabbitmq or isinstance(patient.rabbitmq, Exception):
        return
    for name, queue in patient.app.amqp.queues.items():
        if isinstance(queue, Broadcast):
            continue
        found = _look(patient, name)
        if found is None:
            yield Finding(
                Severity.NOTE, "queues", f"queue {name!r} is not there yet",
                "the first worker or sender declares it",
            )  # fmt: skip
            continue
        if not found.consumers:
            yield Finding(
                Severity.ERROR, "queues",
                f"nobody consumes queue {name!r}; messages waiting there: {found.messages}",
                f"celery worker -Q {name}",
            )  # fmt: skip
        yield from _declared(patient, queue)


def _declared(patient: Patient, queue: Any) -> Iterator[Finding]:
    """Whether RabbitMQ has the queue as the app declares it. It is there: this makes none."""
    channel = patient.rabbitmq.channel()
    try:
        queue(channel).declare()
        channel.close()
    except PreconditionFailed as error:
        yield Finding(
            Severity.ERROR, "declarations", rabbitmq.remedy(error).partition(": empty")[0],
            "empty and delete it (rabbitmqctl delete_queue), or keep it: "
            "task_default_queue_type='classic'",
        )  # fmt: skip
    except ChannelError as error:
        yield Finding(
            Severity.ERROR, "declarations", f"queue {queue.name!r} cannot be declared: {error}",
            "give the user the permissions to configure, write and read it",
        )  # fmt: skip


def queue_types(patient: Patient) -> Iterator[Finding]:
    if not patient.on_rabbitmq:
        return
    classic = [
        name for name, queue in patient.app.amqp.queues.items()
        if not isinstance(queue, Broadcast)
        and (queue.queue_arguments or {}).get("x-queue-type", "classic") == "classic"
    ]  # fmt: skip
    if classic:
        yield Finding(
            Severity.NOTE, "declarations",
            f"classic queues: {', '.join(classic)}. They are on one node alone, and count no "
            "deliveries",
            "quorum queues, which create_celery declares by itself; a queue changes its type only "
            "by being deleted",
        )  # fmt: skip
    for name, queue in patient.app.amqp.queues.items():
        arguments = queue.queue_arguments or {}
        is_quorum = arguments.get("x-queue-type") == "quorum"
        if is_quorum and "x-dead-letter-exchange" not in arguments:
            yield Finding(
                Severity.WARNING, "declarations",
                f"quorum queue {name!r} names no dead letters: RabbitMQ drops, silently, what was "
                "delivered too often",
                "x-dead-letter-exchange among its arguments, or create_celery's queues",
            )  # fmt: skip


def dead_letters(patient: Patient) -> Iterator[Finding]:
    if not patient.on_rabbitmq or isinstance(patient.rabbitmq, Exception):
        return
    found = _look(patient, rabbitmq.DEAD)
    if found is not None and found.messages and not found.consumers:
        yield Finding(
            Severity.WARNING, "dead letters",
            f"nobody takes the messages in {rabbitmq.DEAD!r}, {found.messages} so far",
            "start a worker of an app that create_celery made",
        )  # fmt: skip


def confirms(patient: Patient) -> Iterator[Finding]:
    options = patient.conf.broker_transport_options or {}
    if patient.on_rabbitmq and not options.get("confirm_publish"):
        yield Finding(
            Severity.WARNING, "confirms",
            "a task is sent when its bytes have left: RabbitMQ may refuse or lose it unheard",
            "broker_transport_options={'confirm_publish': True}",
        )  # fmt: skip


def heartbeat(patient: Patient) -> Iterator[Finding]:
    if not patient.on_rabbitmq:
        return
    beat = patient.conf.broker_heartbeat
    if not beat:
        yield Finding(
            Severity.WARNING, "heartbeat",
            "a worker does not notice that RabbitMQ's host is gone, nor RabbitMQ a worker's",
            "broker_heartbeat=10",
        )  # fmt: skip
    longest = durations.longest_run(patient)
    if beat and patient.conf.worker_pool == "solo" and (
        longest is None or longest.seconds > 2 * beat
    ):  # fmt: skip
        yield Finding(
            Severity.WARNING, "heartbeat",
            f"in the solo pool a task holds up the heartbeat: after {durations.text(2 * beat)} "
            "RabbitMQ gives it to another worker",
            "another worker_pool, or a higher broker_heartbeat",
        )  # fmt: skip


def consumer_timeout(patient: Patient) -> Iterator[Finding]:
    """Celery holds a task's delivery until it ends, and RabbitMQ takes back what is held longer."""
    if not patient.on_rabbitmq or isinstance(patient.rabbitmq, Exception):
        return
    late = [task.name for task in patient.tasks if task.acks_late]
    known = _ask_for_timeout(patient)
    timeout = _CONSUMER_TIMEOUT if known is None else known
    if not late or timeout == 0:
        return
    if known is None:
        yield Finding(
            Severity.NOTE, "consumer_timeout",
            "could not look at RabbitMQ's consumer_timeout, which only its own machine tells; "
            f"taken as {durations.text(timeout)}",
            "`rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'` there",
        )  # fmt: skip
    for task, limit in durations.limits(patient):
        if task.acks_late and limit >= timeout:
            yield Finding(
                Severity.ERROR if known else Severity.WARNING, "consumer_timeout",
                f"{task.name} may run for {durations.text(limit)}; after {durations.text(timeout)} "
                "RabbitMQ closes its worker's channel and gives it to another",
                "a longer consumer_timeout in rabbitmq.conf, or shorter tasks",
            )  # fmt: skip
    endless = [name for name in durations.unlimited(patient) if name in late]
    if endless:
        yield Finding(
            Severity.NOTE, "consumer_timeout",
            f"without a time limit: {', '.join(endless[:5])}; after {durations.text(timeout)} "
            "RabbitMQ gives such a task to another worker",
            f"task_time_limit below {timeout:g}",
        )  # fmt: skip


def _ask_for_timeout(patient: Patient) -> float | None:
    """In seconds, 0 for none: no protocol tells it, only the command line on RabbitMQ's machine."""
    program = shutil.which("rabbitmqctl")
    if program is None or not is_local(patient.broker_url):
        return None
    command = [program, "--quiet", "--timeout", "5", "eval", _ASK]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode == 0 and "undefined" in answer.stdout:
        return 0.0
    found = re.search(r"\{ok,\s*(\d+)\}", answer.stdout)
    return int(found[1]) / 1000 if found else None


CHECKS = (
    reachable,
    server_version,
    queue_types,
    queues,
    dead_letters,
    confirms,
    heartbeat,
    consumer_timeout,
)
