"""What endangers an app's tasks: its configuration and its live services, examined.

Each check is a function of a `Patient` that yields findings, each with its remedy. None of them
changes anything, but for declaring on RabbitMQ a queue that exists already.
"""

from collections.abc import Callable, Iterator

from celery import Celery

from celeriac.doctor import configuration, rabbitmq, redis, workers
from celeriac.doctor.patient import Finding, Patient, Severity
from celeriac.settings import Settings

__all__ = ["Finding", "Patient", "Severity", "examine"]

_Check = Callable[[Patient], Iterator[Finding]]
CHECKS: tuple[_Check, ...] = (
    *configuration.CHECKS,
    *redis.CHECKS,
    *rabbitmq.CHECKS,
    *workers.CHECKS,
)


def examine(
    app: Celery, settings: Settings | None = None, *, flower_url: str | None = None
) -> list[Finding]:
    """Every hazard that is found, the worst first. Each service is given a few seconds."""
    with Patient(app, settings, flower_url) as patient:
        found = [finding for check in CHECKS for finding in check(patient)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))
