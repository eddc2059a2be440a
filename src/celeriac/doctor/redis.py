"""What a Redis or Valkey says of itself."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import AuthenticationError, RedisError

from celeriac.doctor.configuration import numbers
from celeriac.doctor.patient import TIMEOUT, Finding, Patient, Server, Severity

_OLDEST = "6.2"  # RESP3, ACL users, and what the scripts call
_SKEW = 2.0  # seconds
_FULL = 0.9  # of the memory that it may take


def reachable(patient: Patient) -> Iterator[Finding]:
    for server in patient.redis_servers():
        answer = patient.client_of(server)
        if isinstance(answer, Exception):
            reason = str(answer).partition(" : <")[0]  # the Sentinels that were asked, at length
            yield Finding(
                Severity.ERROR, "reachable", f"{server.name} does not answer: {reason}",
                _remedy(answer),
            )  # fmt: skip


def _remedy(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, AuthenticationError) or "wrongpass" in text or "noauth" in text:
        return "put the right user and password into its URL, with %40 for @"
    if isinstance(error, (redis.TimeoutError, TimeoutError)) or "timed out" in text:
        return f"it was silent for {TIMEOUT:g} s: look at the firewall, the port and the server"
    if "certificate" in text or "ssl" in text:
        return "?ssl_ca_certs=… names who signed its certificate; redis:// is without TLS"
    if "name or service" in text or "resolution" in text or "nodename" in text:
        return "no such host: look at the name in its URL, and at the DNS here"
    if "no master found" in text:
        return "master_name in broker_transport_options, as the Sentinels know it; start those"
    return "start it, or put the right host and port into its URL"


def eviction(patient: Patient) -> Iterator[Finding]:
    for server, client in patient.answering():
        memory = _info(client, "memory")
        policy, limit = memory.get("maxmemory_policy"), memory.get("maxmemory", 0)
        holds = "queued tasks" if "broker" in server.roles else "results and states"
        if policy is None:
            yield _could_not_look(server, "eviction")
        elif policy != "noeviction":
            yield Finding(
                Severity.ERROR if limit else Severity.WARNING, "eviction",
                f"{server.name} may throw {holds} away when it is full: maxmemory-policy {policy}"
                + ("" if limit else ", with no maxmemory so far"),
                "CONFIG SET maxmemory-policy noeviction, and CONFIG REWRITE",
            )  # fmt: skip
        if limit and memory.get("used_memory", 0) > _FULL * limit:
            used = memory["used_memory"] / limit
            yield Finding(
                Severity.WARNING, "eviction",
                f"{server.name} has taken {used:.0%} of its maxmemory; full, it refuses tasks",
                "a higher maxmemory, a shorter result_expires",
            )  # fmt: skip


def persistence(patient: Patient) -> Iterator[Finding]:
    for server, client in patient.answering():
        found = _info(client, "persistence")
        broken = [name for name in _STATUSES if found.get(name, "ok") != "ok"]
        if not found:
            yield _could_not_look(server, "persistence")
        elif broken:
            yield Finding(
                Severity.ERROR, "persistence",
                f"{server.name} cannot write to its disk: {', '.join(broken)}",
                "look at its log and its disk; until then it may refuse every write",
            )  # fmt: skip
        elif not found.get("aof_enabled"):
            yield _without_log(server, client)


_STATUSES = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")


def _without_log(server: Server, client: redis.Redis) -> Finding:
    snapshots: str | None = None
    with suppress(RedisError):  # managed servers refuse CONFIG
        snapshots = client.config_get("save").get("save")
    if snapshots == "":
        lost, severity = "everything", Severity.ERROR
    else:
        lost, severity = "what came since its last snapshot", Severity.WARNING
    if "broker" not in server.roles:
        severity = Severity.WARNING if severity is Severity.ERROR else Severity.NOTE
    return Finding(
        severity, "persistence",
        f"{server.name} loses {lost} when it restarts: it has no append-only file",
        "CONFIG SET appendonly yes, and CONFIG REWRITE",
    )  # fmt: skip


def server_version(patient: Patient) -> Iterator[Finding]:
    for server, client in patient.answering():
        found = _info(client, "server") | _info(client, "replication")
        version = str(found.get("redis_version", ""))
        if not version:
            yield _could_not_look(server, "version")
        elif numbers(version) < numbers(_OLDEST):
            yield Finding(
                Severity.ERROR, "version", f"{server.name} is version {version}",
                f"Redis {_OLDEST} or newer, or any Valkey",
            )  # fmt: skip
        if found.get("redis_mode") == "cluster":
            yield Finding(
                Severity.ERROR, "version",
                f"{server.name} is a cluster, across which no script and no transaction reaches",
                "one server, with replicas and Sentinel if it must not be away",
            )  # fmt: skip
        if found.get("role") in ("slave", "replica"):
            yield Finding(
                Severity.ERROR, "version", f"{server.name} is a replica, and refuses every write",
                "the primary's address, or sentinel://",
            )  # fmt: skip


def clock(patient: Patient) -> Iterator[Finding]:
    for server, client in patient.answering():
        before = time.time()
        with suppress(RedisError):
            seconds, microseconds = client.time()
            after = time.time()
            theirs = seconds + microseconds / 1e6
            skew = theirs - min(max(theirs, before), after)  # what the way there cannot explain
            if abs(skew) > _SKEW:
                yield Finding(
                    Severity.WARNING, "clock",
                    f"the clock of {server.name} is {abs(skew):.0f} s "
                    f"{'ahead of' if skew > 0 else 'behind'} the one here: tasks with an ETA or "
                    "an expiry run too early, too late or never",
                    "NTP on both",
                )  # fmt: skip


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    try:
        return dict(client.info(section))
    except RedisError:
        return {}


def _could_not_look(server: Server, check: str) -> Finding:
    return Finding(
        Severity.NOTE, check, f"could not look at {server.name}: it refuses INFO",
        "allow its user +info, or look there by hand",
    )  # fmt: skip


CHECKS = (reachable, eviction, persistence, server_version, clock)
