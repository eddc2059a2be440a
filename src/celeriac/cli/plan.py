"""What is to run: from the options and the project to the list of services."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from celeriac.cli.ports import Port, accepts, is_loopback, speaks_http, url
from celeriac.cli.project import ExtraProcess
from celeriac.cli.supervisor import Spec
from celeriac.errors import ConfigurationError

USUAL_PORT = 8010
USUAL_FLOWER_PORT = 5557
RESERVED = ("web", "worker", "beat", "flower", "redis", "database", "celeriac")
# Longer than uvicorn waits for open connections by itself, shorter than the runner waits for it.
_WEB_GRACE = 3


@dataclass(frozen=True)
class Options:
    """The command's options; names as on the command line."""

    app: str
    celery: str
    web: bool
    flower: bool
    beat: bool
    reload: bool
    workers: int
    host: str
    port: int
    flower_port: int
    data: Path


def check(options: Options) -> None:
    """Raise ConfigurationError where the `dev` extra is missing or nothing is left to start."""
    if not (options.web or options.flower or options.beat or options.workers):
        raise ConfigurationError("nothing to start: give fewer --no-… options, or --workers 1")
    wanted = {"uvicorn": options.web, "watchfiles": options.reload, "flower": options.flower}
    missing = [name for name, needed in wanted.items() if needed and find_spec(name) is None]
    if missing:
        hint = ", or leave it out with --no-flower" if missing == ["flower"] else ""
        raise ConfigurationError(
            f"{', '.join(missing)} not installed: pip install 'celeriac[dev]'{hint}"
        )


def ports(options: Options, extras: Sequence[ExtraProcess]) -> list[Port]:
    needed = []
    if options.web:
        needed.append(Port(options.port, "web", "choose another with --port", options.host))
    if options.flower:
        remedy = "choose another with --flower-port"
        needed.append(Port(options.flower_port, "flower", remedy, options.host))
    needed += [
        Port(extra.port, extra.name, "choose another in pyproject.toml, or shift all with --port")
        for extra in extras
        if extra.port is not None
    ]
    return needed


def services(
    options: Options,
    extras: Sequence[ExtraProcess],
    env: Mapping[str, str],
    *,
    colour: bool,
    alone: bool,
) -> list[Spec]:
    """Everything to start, in the order of starting. `alone`: the broker is the runner's own."""
    found = []
    if options.flower:
        # First: it shows only the tasks sent after it has begun to listen.
        found.append(_flower(options, env, colour))
    if options.web:
        found.append(_web(options, env, colour))
    # A broker of our own has no other workers yet: asking them costs a second.
    first_time = ("--without-mingle",) if alone else ()
    found += [
        replace(_worker(options, env, colour, number + 1), first_time=first_time)
        for number in range(options.workers)
    ]
    if options.beat:
        found.append(_beat(options, env, colour))
    return found + [_extra(extra, env) for extra in extras]


def _celery(options: Options, colour: bool, *arguments: str) -> tuple[str, ...]:
    plain = () if colour else ("--no-color",)
    return (sys.executable, "-m", "celery", *plain, "-A", options.celery, *arguments)


def _web(options: Options, env: Mapping[str, str], colour: bool) -> Spec:
    address = ("--host", options.host, "--port", str(options.port))
    return Spec(
        name="web",
        command=(
            *(sys.executable, "-m", "uvicorn", options.app, *address),
            *("--timeout-graceful-shutdown", str(_WEB_GRACE)),
            "--use-colors" if colour else "--no-use-colors",
        ),
        env=env,
        address=url(options.host, options.port),
        answers=partial(speaks_http, options.host, options.port),
        reloads=True,
    )


def _worker(options: Options, env: Mapping[str, str], colour: bool, number: int) -> Spec:
    node = f"worker{number}{{generation}}@%h"
    # Anywhere in the line: the application may log JSON.
    ready = re.compile(rf"\bworker{number}(\.\d+)?@\S+ ready\.")
    return Spec(
        name="worker" if options.workers == 1 else f"worker{number}",
        command=_celery(options, colour, "worker", "--loglevel=info", "-E", "-n", node),
        # A user's REMAP_SIGTERM would cut running tasks at every reload.
        env={name: value for name, value in env.items() if name != "REMAP_SIGTERM"},
        says=lambda line: ready.search(line) is not None,
        reloads=True,
        overlaps=True,
        kind="worker",
    )


def _beat(options: Options, env: Mapping[str, str], colour: bool) -> Spec:
    schedule = str(options.data / "celerybeat-schedule")
    arguments = ("--loglevel=info", "--schedule", schedule, "--pidfile=")
    return Spec(
        name="beat",
        command=_celery(options, colour, "beat", *arguments),
        env=env,
        says=lambda line: "beat: Starting..." in line,
        reloads=True,
    )


def _flower(options: Options, env: Mapping[str, str], colour: bool) -> Spec:
    address = (f"--address={options.host}", f"--port={options.flower_port}")
    own = {"FLOWER_UNAUTHENTICATED_API": "true"} if is_loopback(options.host) else {}
    return Spec(
        name="flower",
        command=_celery(options, colour, "flower", *address),
        env={**own, **env},
        address=url(options.host, options.flower_port),
        answers=partial(accepts, options.host, options.flower_port),
        early=True,
    )


def _extra(extra: ExtraProcess, env: Mapping[str, str]) -> Spec:
    if extra.port is None:
        return Spec(name=extra.name, command=extra.command, env=env)
    return Spec(
        name=extra.name,
        command=extra.command,
        env=env,
        address=url("127.0.0.1", extra.port),
        answers=partial(accepts, "127.0.0.1", extra.port),
    )
