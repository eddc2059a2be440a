"""What can be told from the configuration and the installed packages alone."""

import re
from collections.abc import Iterator
from importlib import metadata
from urllib.parse import unquote, urlsplit

from celery.utils.imports import symbol_by_name
from kombu.transport import redis as kombu_redis

from celeriac import transport
from celeriac.doctor import durations
from celeriac.doctor.patient import Finding, Patient, Severity
from celeriac.settings import is_local, is_secret

_KOMBU_VISIBILITY = 3600.0  # seconds
_UNSAFE = {"pickle", "application/x-python-serialize", "yaml", "application/x-yaml", "*"}
_DEFAULT_PASSWORDS = {"", "guest", "password", "secret", "changeme", "admin", "celery", "root"}


def acknowledgement(patient: Patient) -> Iterator[Finding]:
    early = [task.name for task in patient.tasks if not task.acks_late]
    if not patient.conf.task_acks_late and (early or not patient.tasks):
        yield Finding(
            Severity.WARNING, "acknowledgement",
            f"tasks are acknowledged before they run ({_some(early)}): a worker that dies loses "
            "what it runs",
            "task_acks_late=True, and acks_late=False on the tasks that must not run twice",
        )  # fmt: skip
    elif early:
        yield Finding(
            Severity.NOTE, "acknowledgement",
            f"acknowledged before they run, and lost with their worker: {_some(early)}",
            "acks_late=True on those that may run twice",
        )  # fmt: skip
    if patient.conf.task_acks_late and not patient.conf.task_reject_on_worker_lost:
        yield Finding(
            Severity.WARNING, "acknowledgement",
            "a task whose process dies is acknowledged all the same, as a failure",
            "task_reject_on_worker_lost=True: it runs again",
        )  # fmt: skip


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "all"


def content(patient: Patient) -> Iterator[Finding]:
    conf = patient.conf
    accepted = set(conf.accept_content or ()) | set(conf.result_accept_content or ())
    used = {conf.task_serializer, conf.result_serializer}
    unsafe = sorted((accepted | used) & _UNSAFE)
    if unsafe:
        yield Finding(
            Severity.ERROR, "content",
            f"{', '.join(unsafe)} is accepted or sent: whoever can write to the broker or to the "
            "results runs code here",
            "accept_content=['json'], task_serializer='json', result_serializer='json'",
        )  # fmt: skip


def eager(patient: Patient) -> Iterator[Finding]:
    if patient.conf.task_always_eager:
        yield Finding(
            Severity.ERROR, "eager",
            "tasks run in the process that sends them, and no worker gets any",
            "task_always_eager=False, anywhere but in tests",
        )  # fmt: skip


def results(patient: Patient) -> Iterator[Finding]:
    url = patient.result_url
    if not url or url.startswith("disabled"):
        yield Finding(
            Severity.WARNING, "results",
            "there is no result backend: no state, no progress, no chord, no record of a run whose "
            "worker died",
            "result_backend='redis://…'",
        )  # fmt: skip
    elif url.startswith(("rpc", "amqp", "cache+memory")):
        yield Finding(
            Severity.WARNING, "results",
            f"results in {url.partition(':')[0]} can be read by one process alone, or once",
            "result_backend='redis://…'",
        )  # fmt: skip
    if urlsplit(patient.broker_url).scheme in ("memory", "filesystem"):
        yield Finding(
            Severity.ERROR, "broker",
            f"the broker {patient.broker_url.partition(':')[0]}:// is for tests: messages end with "
            "the process, or lie in a folder",
            "broker_url='redis://…' or 'amqp://…'",
        )  # fmt: skip


def secrets(patient: Patient) -> Iterator[Finding]:
    for server in patient.servers:
        parts = urlsplit(server.url)
        if is_local(server.url) or not parts.hostname:
            continue
        password = unquote(parts.password or "")
        if password.lower() in _DEFAULT_PASSWORDS:
            kind = "no password" if not password else "a password that everybody tries first"
            if parts.scheme.endswith("amqp") and not password:
                kind = "RabbitMQ's guest"  # which is what kombu then says
            yield Finding(
                Severity.ERROR, "secrets", f"{server.name}, on another machine, has {kind}",
                "set a user and a password of its own there, and in the URL",
            )  # fmt: skip
        if parts.scheme in ("redis", "amqp", "pyamqp", "sentinel"):
            yield Finding(
                Severity.NOTE, "secrets", f"{server.name} is reached without TLS",
                "rediss:// or amqps://, unless nobody else is on that network",
            )  # fmt: skip
    yield from _default_settings(patient)


def _default_settings(patient: Patient) -> Iterator[Finding]:
    if patient.settings is None:
        return
    for name, _, origin in patient.settings.explain():
        value = getattr(patient.settings, name.lower(), None)
        if is_secret(name) and origin.startswith("default") and isinstance(value, str) and value:
            yield Finding(
                Severity.ERROR, "secrets",
                f"{name} has the value that is written in the source: {origin}",
                f"set {name} in the environment",
            )  # fmt: skip


def schedulers(patient: Patient) -> Iterator[Finding]:
    if not patient.conf.beat_schedule:
        return
    scheduler = symbol_by_name(patient.conf.beat_scheduler)
    if not any(base.__module__ == "celeriac.beat" for base in scheduler.__mro__):
        yield Finding(
            Severity.WARNING, "schedulers",
            f"{scheduler.__module__}.{scheduler.__qualname__} holds no lease: while two beats run, "
            "as during a deployment, each entry is sent twice",
            "beat_scheduler='celeriac.beat:Scheduler'",
        )  # fmt: skip


def visibility(patient: Patient) -> Iterator[Finding]:
    if not patient.on_redis:
        return
    with patient.app.connection_for_write() as connection:
        chosen = connection.get_transport_cls()
    ours = issubclass(chosen, transport.Transport) if isinstance(chosen, type) else False
    if ours or not issubclass(chosen, kombu_redis.Transport):
        return  # which renews what it holds, whatever the time-out
    given = (patient.conf.broker_transport_options or {}).get("visibility_timeout")
    timeout = float(given or _KOMBU_VISIBILITY)
    remedy = "adopt the app, without a broker_transport of its own, or visibility_timeout=…"
    found = [durations.longest_run(patient), durations.longest_wait(patient)]
    for longest in found:
        if longest is not None and longest.seconds >= timeout:
            yield Finding(
                Severity.ERROR, "visibility",
                f"{longest.what} is {durations.text(longest.seconds)}, and kombu's transport gives "
                f"a task to a second worker after {durations.text(timeout)} (kombu issue 337)",
                remedy,
            )  # fmt: skip
    endless = durations.unlimited(patient)
    if endless:
        yield Finding(
            Severity.WARNING, "visibility",
            f"{_some(endless)}: no time limit, and kombu's transport gives a task to a second "
            f"worker after {durations.text(timeout)} (kombu issue 337)",
            remedy,
        )  # fmt: skip


# What is known to fail where it is installed: a package, and since which version it is mended.
_BROKEN = {
    "broadcaster": (None, "with redis-py 8 its subscribers receive nothing, silently",
                    "celeriac.status.Reader"),
    "celery-redbeat": (None, "a lock that was lost ends its beat", "celeriac.beat:Scheduler"),
}  # fmt: skip


def versions(patient: Patient) -> Iterator[Finding]:
    for package, (mended, what, remedy) in _BROKEN.items():
        installed = _installed(package)
        if installed and (mended is None or installed < numbers(mended)):
            yield Finding(
                Severity.WARNING, "versions",
                f"{package} {metadata.version(package)} is installed: {what}", f"use {remedy}",
            )  # fmt: skip
    for requirement in metadata.requires("celeriac") or ():
        wanted = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
        if wanted is None or "extra ==" in requirement:
            continue
        installed = _installed(wanted[1])
        if installed is None or installed < numbers(wanted[2]):
            yield Finding(
                Severity.ERROR, "versions",
                f"{wanted[1]} {metadata.version(wanted[1])} is installed, which celeriac does not "
                "work with",
                f"pip install '{wanted[0]}'",
            )  # fmt: skip


def _installed(package: str) -> tuple[int, ...] | None:
    try:
        return numbers(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, what is numbers: enough to tell old from new."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


CHECKS = (
    acknowledgement,
    content,
    eager,
    results,
    secrets,
    schedulers,
    visibility,
    versions,
)
