"""Whether the processes of a system are alive, and ready, without importing what they run.

Workers and beats write what they know of themselves into a small file each, every few seconds;
`celeriac health` reads it. Times in it are the machine's monotonic clock, which all its processes
share and nobody sets.
"""

import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

# The standard library's cheap part only: a probe is a whole process, started every few seconds.

ROLES = ("worker", "beat")
EVERY = 2.0  # seconds between two reports
PATIENCE = 15.0  # seconds of silence until a process counts as dead


class HealthError(Exception):
    """What is not well."""


def directory(*, make: bool = False) -> str:
    """The private directory of the reports: CELERIAC_HEALTH_DIR, else one for each user.

    Raises HealthError where somebody else may write there.
    """
    default = f"{os.environ.get('TMPDIR') or '/tmp'}/celeriac-health-{os.getuid()}"  # noqa: S108
    path = os.environ.get("CELERIAC_HEALTH_DIR") or default
    if make:
        os.makedirs(path, mode=0o700, exist_ok=True)  # noqa: PTH103
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise HealthError(
            f"{path} is not a directory that this user alone may write to: "
            "set CELERIAC_HEALTH_DIR to another"
        )
    return path


class Report:
    """A process's own report: written whole, removed by `remove`."""

    def __init__(self, role: str, name: str) -> None:
        path = directory(make=True)
        list(_reports(path, role))  # which removes those of processes that were killed
        self._path = f"{path}/{role}-{os.getpid()}.json"
        self._known: dict[str, object] = {"pid": os.getpid(), "name": name}
        self._reason: str | None = None
        self._since = 0.0

    def write(self, unready: str, **more: object) -> None:
        """`unready` says why the process is not ready; empty, that it is."""
        now = time.monotonic()
        if unready != self._reason:
            self._reason, self._since = unready, now
        report = self._known | {"written": now, "unready": unready, "since": self._since} | more
        fresh = f"{self._path}.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
            json.dump(report, file)
        os.replace(fresh, self._path)  # noqa: PTH105

    def remove(self) -> None:
        if os.getpid() != self._known["pid"]:
            return  # a forked child's exit is not that of its parent
        with suppress(OSError):
            os.unlink(self._path)  # noqa: PTH108


def check(role: str, name: str = "", *, ready: bool = False, patience: float = PATIENCE) -> str:
    """One line that says that every `role` on this machine, or the one called `name`, is well.

    Raises HealthError with one line that says what is not.
    """
    try:
        path = directory()
    except FileNotFoundError:
        raise HealthError(f"no {role} has reported on this machine") from None
    found = [each for each in _reports(path, role) if name in ("", each["name"])]
    if not found:
        called = f" called {name}" if name else ""
        raise HealthError(f"no {role}{called} that runs has reported in {path}")
    lines = [_well(role, each, ready, patience) for each in found]
    return lines[0] if len(lines) == 1 else f"{len(lines)} processes are well: {'; '.join(lines)}"


def _reports(path: str, role: str) -> Iterator[dict[str, Any]]:
    for file in sorted(os.listdir(path)):  # noqa: PTH208
        if not (file.startswith(f"{role}-") and file.endswith(".json")):
            continue
        report = _report(f"{path}/{file}")
        if report is not None:
            yield report
        else:
            with suppress(OSError):
                os.unlink(f"{path}/{file}")  # noqa: PTH108


def _report(path: str) -> dict[str, Any] | None:
    """What a process that runs has written there."""
    try:
        with open(path, encoding="utf-8") as opened:  # noqa: PTH123
            report: dict[str, Any] = json.load(opened)
        # A later moment than now is one of the time before the machine's last start.
        earlier = report["written"] <= time.monotonic() and report["since"] <= time.monotonic()
        return report if earlier and report["name"] and _runs(report["pid"]) else None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ):  # its process has just ended; it is no report
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's by now
        return False
    return True


def _well(role: str, report: dict[str, Any], ready: bool, patience: float) -> str:
    now = time.monotonic()

    def age(key: str) -> float:
        moment = report.get(key)
        return now - moment if isinstance(moment, float) else 0.0

    who = f"{role} {report['name']}"
    if age("written") > patience:
        raise HealthError(f"{who} is not alive: silent for {age('written'):.0f} s")
    for part, what in (("turned", "its main loop"), ("loop", "the event loop of its tasks")):
        if age(part) > patience:
            raise HealthError(f"{who} is not alive: {what} has stood for {age(part):.0f} s")
    reason, since = report["unready"], f"{age('since'):.0f} s"
    if ready and reason:
        raise HealthError(f"{who} is not ready: {reason}, for {since}")
    return f"{who} is alive; not ready: {reason}, for {since}" if reason else f"{who} is ready"


def check_web(url: str, *, ready: bool = False, timeout: float = 3.0) -> str:
    """One line that says that `url` is answered; where `ready`, with success.

    Raises HealthError.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise HealthError(f"{url} is no http:// address")
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    try:
        status = _status(parts.hostname, parts.port or 80, target, timeout)
    except (OSError, ValueError) as error:
        raise HealthError(
            f"web is not alive: {url}: {str(error) or type(error).__name__}"
        ) from None
    if ready and not 200 <= status < 300:
        raise HealthError(f"web is not ready: {url} answers {status}")
    return f"web is alive: {url} answers {status}"


def _status(host: str, port: int, target: str, timeout: float) -> int:
    import socket  # alone: http.client takes half as long again to import as all the rest

    with socket.create_connection((host, port), timeout) as connection:
        request = f"GET {target} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n"
        connection.sendall(request.encode())
        with connection.makefile("rb") as answer:
            line = answer.readline(256).decode("latin-1")
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/"):
        raise ValueError(f"no HTTP: {line.strip()!r}")
    return int(rest[:3])
