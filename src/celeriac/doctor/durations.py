"""The longest that a task of an app runs, or waits, as far as its configuration says."""

from datetime import timedelta
from typing import Any, NamedTuple

from celeriac.doctor.patient import Patient


class Longest(NamedTuple):
    seconds: float
    what: str


def longest_run(patient: Patient) -> Longest | None:
    """By the time limits. None where no task has one."""
    found = [Longest(limit, f"the time limit of {task.name}") for task, limit in limits(patient)]
    return max(found, default=None)


def limits(patient: Patient) -> list[tuple[Any, float]]:
    hard, soft = patient.conf.task_time_limit, patient.conf.task_soft_time_limit
    found = []
    for task in patient.tasks:
        # Whichever there is: the soft one ends a task that does not catch it.
        limit = task.time_limit or task.soft_time_limit or hard or soft
        if limit:
            found.append((task, float(limit)))
    return found


def unlimited(patient: Patient) -> list[str]:
    """The tasks that nothing ends."""
    limited = {task.name for task, _ in limits(patient)}
    return [task.name for task in patient.tasks if task.name not in limited]


def longest_wait(patient: Patient) -> Longest | None:
    """By the delays of retries and the countdowns of the schedule."""
    found = []
    for task in patient.tasks:
        if task.max_retries != 0:
            backoff = getattr(task, "retry_backoff", False)
            delay = getattr(task, "retry_backoff_max", 600) if backoff else 0
            found.append(Longest(float(delay or task.default_retry_delay or 0), "a retry's delay"))
    for name, entry in (patient.conf.beat_schedule or {}).items():
        countdown = (entry.get("options") or {}).get("countdown")
        if countdown:
            found.append(Longest(_seconds(countdown), f"the countdown of {name!r} in the schedule"))
    return max(found, default=None)


def _seconds(value: Any) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def text(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 120 else f"{seconds:g} s"
