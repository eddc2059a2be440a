"""What is to run: from the options and the project's pyproject.toml to the list of services."""

import errno
import ipaddress
import os
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from celeriac.errors import ConfigurationError

USUAL_PORT = 8010
USUAL_FLOWER_PORT = 5557
_RESERVED = ("web", "worker", "beat", "flower", "redis", "database", "celeriac")
_SECTION = "tool.celeriac.dev."
_TABLE = f"{_SECTION}processes."
_WEB = f"{_SECTION}web"
_KINDS: dict[type, str] = {str: "a string", int: "a number", dict: "a table"}
_REMEDIES = {"web": "choose another with --port", "flower": "choose another with --flower-port"}
_OTHER_REMEDY = "choose another in pyproject.toml, or shift all with --port"
# Longer than uvicorn waits for open connections by itself, shorter than the runner waits for it.
_WEB_GRACE = 3

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """The command's options; names as on the command line."""

    app: str
    web_command: str
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


@dataclass(frozen=True)
class Project:
    """What pyproject.toml says in [tool.celeriac.dev]."""

    app: str = "main:app"
    celery: str = "main.celery"
    web: str = ""  # a command, in the place of uvicorn's
    env: Mapping[str, str] = field(default_factory=dict)
    processes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """What a service is. `{generation}` in a command grows by one with every reload, `first_time`
    is added when the service is started for the first time, `env` to what all processes get.

    It is ready when its port accepts connections (`http`: answers), or when a line matches `says`.
    `early`: needs no checked application and no migrated database.
    `worker`: on reload the old process finishes its tasks while the new one has already begun.
    `extra`: the application's own, which its tasks may call, so it ends after them.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int | None = None
    http: bool = False
    says: str = ""
    reloads: bool = False
    worker: bool = False
    early: bool = False
    extra: bool = False
    first_time: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return "-" if self.port is None else url(self.host, self.port)


def reachable(host: str) -> str:
    """The address at which a server that listens on `host` is met from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104


def url(host: str, port: int) -> str:
    shown = reachable(host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def check(options: Options) -> None:
    """Raise ConfigurationError where the `dev` extra is missing or the options make no sense."""
    if options.web and not options.web_command and ":" not in options.app:
        raise ConfigurationError(f"--app must be module:attribute, got {options.app!r}")
    if "." not in options.celery:
        raise ConfigurationError(f"--celery must be module.attribute, got {options.celery!r}")
    if not (options.web or options.flower or options.beat or options.workers):
        raise ConfigurationError("nothing to start: give fewer --no-… options, or --workers 1")
    uvicorn = options.web and not options.web_command
    wanted = {"uvicorn": uvicorn, "watchfiles": options.reload, "flower": options.flower}
    missing = [name for name, needed in wanted.items() if needed and find_spec(name) is None]
    if missing:
        hint = ", or leave it out with --no-flower" if missing == ["flower"] else ""
        raise ConfigurationError(
            f"{', '.join(missing)} not installed: pip install 'celeriac[dev]'{hint}"
        )


def services(options: Options, *, colour: bool, alone: bool) -> list[Spec]:
    """Everything of ours, in the order of starting. `alone`: the broker is the runner's own."""
    celery = (sys.executable, "-m", "celery", *(() if colour else ("--no-color",)))
    celery += ("-A", options.celery)
    found = []
    if options.flower:
        # First: it shows only the tasks sent after it has begun to listen.
        found.append(_flower(options, celery))
    if options.web:
        found.append(_web(options, colour))
    for number in range(1, options.workers + 1):
        name = "worker" if options.workers == 1 else f"worker{number}"
        found.append(_worker(name, f"worker{number}", celery, alone))
    if options.beat:
        schedule = ("--schedule", str(options.data / "celerybeat-schedule"), "--pidfile=")
        command = (*celery, "beat", "--loglevel=info", *schedule)
        found.append(Spec("beat", command, says=r"beat: Starting\.\.\.", reloads=True))
    return found


def _flower(options: Options, celery: tuple[str, ...]) -> Spec:
    address = (f"--address={options.host}", f"--port={options.flower_port}")
    try:
        private = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        private = options.host == "localhost"
    opened = "FLOWER_UNAUTHENTICATED_API"
    return Spec(
        name="flower",
        command=(*celery, "flower", *address),
        env={opened: os.environ.get(opened, "true")} if private else {},
        host=options.host,
        port=options.flower_port,
        early=True,
    )


def _web(options: Options, colour: bool) -> Spec:
    command: tuple[str, ...]
    if options.web_command:
        own = options.web_command.replace("{host}", options.host)
        command = _words(_with_port(own, options.port, _WEB), _WEB)
    else:
        command = (
            *(sys.executable, "-m", "uvicorn", options.app),
            *("--host", options.host, "--port", str(options.port)),
            *("--timeout-graceful-shutdown", str(_WEB_GRACE)),
            "--use-colors" if colour else "--no-use-colors",
        )
    return Spec(
        name="web",
        command=command,
        host=options.host,
        port=options.port,
        http=True,
        reloads=True,
    )


def _worker(name: str, node: str, celery: tuple[str, ...], alone: bool) -> Spec:
    return Spec(
        name=name,
        command=(*celery, "worker", "--loglevel=info", "-E", "-n", node + "{generation}@%h"),
        # A user's value, or the profile's, would cut running tasks at every reload.
        env={"REMAP_SIGTERM": "", "CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT": "0"},
        # Anywhere in the line: the application may log JSON.
        says=rf"\b{node}(\.\d+)?@\S+ ready\.",
        reloads=True,
        worker=True,
        # A broker of our own has no other workers yet: asking them costs a second.
        first_time=("--without-mingle",) if alone else (),
    )


def read_project(folder: Path) -> Project:
    """Raises ConfigurationError naming the wrong key."""
    try:
        content = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Project()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"pyproject.toml is not TOML: {error}") from None
    ours = _get(_get(content, "tool", dict), "celeriac", dict, "tool.")
    section = _get(ours, "dev", dict, "tool.celeriac.")
    _refuse_unknown(section, ("app", "celery", "web", "env", "processes"), _SECTION)
    env = _get(section, "env", dict, _SECTION)
    return Project(
        _get(section, "app", str, _SECTION) or Project.app,
        _get(section, "celery", str, _SECTION) or Project.celery,
        _get(section, "web", str, _SECTION),
        {name: _get(env, name, str, f"{_SECTION}env.") for name in env},
        _get(section, "processes", dict, _SECTION),
    )


def extra_processes(
    project: Project, shift: int, taken: Collection[str]
) -> tuple[list[Spec], dict[str, str]]:
    """The processes that the project adds, their ports moved by `shift`, and what they add to
    everybody's environment. Raises ConfigurationError naming the wrong key.
    """
    tables = project.processes
    specs: list[Spec] = []
    variables = dict(project.env)
    for name in tables:
        table = _get(tables, name, dict, _TABLE)
        where = f"{_TABLE}{name}."
        if name in taken or name in _RESERVED:
            raise ConfigurationError(f"pyproject.toml: {where} the name {name} is taken, rename it")
        _refuse_unknown(table, ("command", "port", "env"), where)
        port = _get(table, "port", int, where) + shift if "port" in table else None
        command = _with_port(_get(table, "command", str, where), port, f"{where}command")
        specs.append(Spec(name, _words(command, f"{where}command"), port=port, extra=True))
        env, where = _get(table, "env", dict, where), f"{where}env."
        for key in env:
            variables[key] = _with_port(_get(env, key, str, where), port, f"{where}{key}")
    return specs, variables


def _get(table: Mapping[str, Any], key: str, kind: type[_T], where: str = "") -> _T:
    value = table.get(key, kind())
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigurationError(
            f"pyproject.toml: {where}{key} must be {_KINDS[kind]}, got {value!r}"
        )
    return value


def _refuse_unknown(table: Mapping[str, object], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            expected = ", ".join(known)
            raise ConfigurationError(
                f"pyproject.toml: unknown key {where}{key}, expected {expected}"
            )


def _with_port(text: str, port: int | None, where: str) -> str:
    # Not str.format: a command may hold braces of its own.
    if "{port}" in text and port is None:
        raise ConfigurationError(f"pyproject.toml: {where} uses {{port}}, but no port is given")
    return text.replace("{port}", str(port))


def _words(command: str, where: str) -> tuple[str, ...]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"pyproject.toml: {where}: {error}") from None
    if not words:
        raise ConfigurationError(f"pyproject.toml: {where} is missing: give one")
    if words[0] == "python":
        words[0] = sys.executable  # a shell's own PATH may know another
    if shutil.which(words[0]) is None:
        raise ConfigurationError(f"pyproject.toml: {where}: {words[0]} is not found")
    return tuple(words)


def check_ports(specs: Iterable[Spec]) -> None:
    """Raise ConfigurationError for the first port that cannot be listened on."""
    owners: dict[int, str] = {}
    for spec in specs:
        if spec.port is None:
            continue
        remedy = _REMEDIES.get(spec.name, _OTHER_REMEDY)
        if not 0 < spec.port < 65536:
            raise ConfigurationError(f"{spec.name}: {spec.port} is not a port; {remedy}")
        if (owner := owners.setdefault(spec.port, spec.name)) != spec.name:
            both = f"{owner} and {spec.name}"
            raise ConfigurationError(f"port {spec.port} is meant for {both}; {remedy}")
        _check_port(spec.host, spec.port, f"port {spec.port} ({spec.name})", remedy)


def _check_port(host: str, port: int, what: str, remedy: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the servers do: connections that linger after a restart are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"{what} is taken by another program; {remedy}") from None
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigurationError(
            f"{what} cannot be used on {host}: {reason}; {remedy}, or another --host"
        ) from None
