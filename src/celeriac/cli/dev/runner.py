"""One run of `celeriac dev`: check, start, watch, stop."""

import asyncio
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dotenv import dotenv_values

from celeriac.cli.dev import plan, probe, servers
from celeriac.cli.dev.output import Console, coloured
from celeriac.cli.dev.plan import Options, Project, Spec
from celeriac.cli.dev.servers import KeptValkey
from celeriac.cli.dev.supervisor import Service, Supervisor, cancel, describe_end
from celeriac.cli.dev.watchdog import Watchdog
from celeriac.errors import ConfigurationError

# The watchdog of a runner that was killed holds the lock until its clean-up is over.
_CLEAN_UP = 6.0
_TABLE_AFTER = 60.0
_SLOW_CHECK = 5.0
_IGNORED_FOLDERS = {"__pycache__", "node_modules", "venv", "site-packages"}


def run(options: Options, project: Project) -> None:
    """Run everything until a signal ends it. Raises CeleriacError where the start fails."""
    plan.check(options)
    # The environment wins.
    named = {**dotenv_values(".env"), **os.environ}
    user = {name: value for name, value in named.items() if value}
    specs = plan.services(options, colour=coloured(), alone=servers.needs_valkey(user))
    taken = [spec.name for spec in specs]
    extras, variables = plan.extra_processes(project, options.port - plan.USUAL_PORT, taken)
    if options.flower:
        variables.setdefault("FLOWER_URL", plan.url(options.host, options.flower_port))
    with _locked(options.data) as lock:
        plan.check_ports([*specs, *extras])
        asyncio.run(Runner(options, [*specs, *extras], user, variables, lock).run())


@contextmanager
def _locked(data: Path) -> Iterator[int]:
    """The descriptor of the data folder's lock; who inherits it holds the lock too."""
    try:
        if not data.exists():
            data.mkdir(parents=True)
            (data / ".gitignore").write_text("*\n")  # it holds secrets
        lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"cannot use the data folder {data}: {error.strerror or error}; "
            "choose another with --data"
        ) from None
    try:
        deadline = time.monotonic() + _CLEAN_UP
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
                if _alive(holder) or time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"the data folder {data} is in use by another celeriac dev (pid {holder}); "
                        "end that one, or choose another folder with --data"
                    ) from None
                time.sleep(0.05)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False  # ValueError: just locked, not yet written
    except PermissionError:
        pass
    return True


def _write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """Write `export K='v'` lines for another shell; for the user's eyes only."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items())]
    path.unlink(missing_ok=True)  # an old file may have wider rights
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(lines)


class Runner:
    """Everything that one run holds. `run` returns after the processes are gone."""

    def __init__(
        self,
        options: Options,
        specs: Sequence[Spec],
        user: Mapping[str, str],
        variables: Mapping[str, str],
        lock: int,
    ) -> None:
        self._options = options
        self._user = user
        self._folder = Path.cwd()
        self._env_file = options.data / "env"
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._console = Console(
            [spec.name for spec in specs],
            on_closed=lambda: self._loop.call_soon_threadsafe(self._on_signal, None),
        )
        self._watchdog = Watchdog(lock)
        self._supervisor = Supervisor(self._console, self._watchdog)
        self._services = [Service(spec, self._supervisor) for spec in specs]
        self._valkey: KeptValkey | None = None
        if servers.needs_valkey(user):
            self._valkey = KeptValkey(options.data / "valkey", self._supervisor)
        server = self._valkey.server if self._valkey is not None else None
        given = {**servers.variables(user, server, options.data), **variables}
        self._variables = {name: value for name, value in given.items() if name not in user}
        plain = {} if coloured() else {"NO_COLOR": "1"}
        self._supervisor.env = {**os.environ, **self._variables, **plain, "PYTHONUNBUFFERED": "1"}

    def _on_signal(self, number: signal.Signals | None) -> None:
        if self._stop.is_set() and number is signal.SIGINT:
            self._hurry.set()
        self._stop.set()

    async def run(self) -> None:
        """Raises CeleriacError where the start fails; whatever was started is ended first."""
        self._loop = asyncio.get_running_loop()
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *(() if nohup else (signal.SIGHUP,))):
            self._loop.add_signal_handler(number, self._on_signal, number)
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                self._console.say("stopping")
        finally:
            await cancel(work, stop)
            await self._end()
        if not work.cancelled():
            work.result()

    async def _end(self) -> None:
        await self._supervisor.stop(self._hurry)
        if self._valkey is not None:
            await self._valkey.close()
        self._env_file.unlink(missing_ok=True)  # its addresses are gone
        self._watchdog.dismiss()
        self._console.close()

    async def _work(self) -> None:
        _write_env_file(self._env_file, self._variables)
        if self._valkey is not None:
            await self._valkey.start()
        await asyncio.to_thread(servers.check, self._user)
        await self._start_services()
        self._supervisor.watch(self._keep_watchdog())
        self._supervisor.watch(self._show_table())
        if self._valkey is not None:
            self._supervisor.watch(self._valkey.keep())
        if self._options.reload:
            await self._watch_files()
        await self._stop.wait()

    async def _start_services(self) -> None:
        # The early ones take the second processor while the application is checked; should that
        # fail, nobody wants to read what they say about it: the console keeps it back until then.
        for service in self._services:
            if service.spec.early:
                self._supervisor.watch(service.run())
        await self._check_application()
        self._console.release()
        for service in self._services:
            if not service.spec.early:
                self._supervisor.watch(service.run())

    async def _check_application(self) -> None:
        web = self._options.app if self._options.web and not self._options.web_command else ""
        migrate = "migrate" if (self._folder / "alembic.ini").exists() else ""
        lines: list[str] = []
        command = (sys.executable, "-m", probe.__name__, web, self._options.celery, migrate)
        child = await self._supervisor.spawn(Spec("check", command), command, lines.append)
        remark = "still importing the application, or migrating its database"
        slow = self._loop.call_later(_SLOW_CHECK, self._console.say, remark)
        try:
            code = await child.wait()
        finally:
            slow.cancel()
        if code == 0:
            return
        refusals = [line.removeprefix(probe.MARK) for line in lines if line.startswith(probe.MARK)]
        said = [line for line in lines if line.strip()] or [describe_end(code)]
        # A crash inside the application leaves no refusal: its last word is all there is.
        raise ConfigurationError(refusals[0] if refusals else said[-1])

    async def _keep_watchdog(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._watchdog.revive():
                self._console.say("the watchdog was gone; started it again")

    async def _show_table(self) -> None:
        with suppress(TimeoutError):
            ready = asyncio.gather(*[service.ready.wait() for service in self._services])
            await asyncio.wait_for(ready, _TABLE_AFTER)
        rows = [(it.spec.name, it.spec.address, it.state) for it in self._services]
        known = {**self._user, **self._variables}
        if self._valkey is not None:
            rows.append(("redis", str(self._valkey.server.socket), self._valkey.state))
        elif redis := known.get(servers.BROKER) or known.get(servers.REDIS):
            rows.append(("redis", servers.shown(redis), "ready"))
        if servers.DATABASE in known:
            rows.append(("database", servers.shown(known[servers.DATABASE]), "ready"))
        self._console.table(rows)
        path = str(self._env_file)
        if self._env_file.is_relative_to(self._folder):
            path = f"./{self._env_file.relative_to(self._folder)}"
        self._console.say(f"for another shell: . {shlex.quote(path)}    (Ctrl-C ends everything)")

    async def _watch_files(self) -> None:
        from watchfiles import awatch

        stop = asyncio.Event()
        changes = awatch(
            self._folder,
            watch_filter=lambda _, path: self._is_code(Path(path)),
            debounce=400,
            stop_event=stop,
            ignore_permission_denied=True,
        )
        try:
            async for change in changes:
                self._reload(sorted({Path(path) for _, path in change}))
        except OSError as error:
            self._console.say(
                f"cannot watch the files ({error}), going on without reload; "
                "WATCHFILES_FORCE_POLLING=1 may help"
            )
        finally:
            stop.set()  # its thread looks at nothing else

    def _is_code(self, file: Path) -> bool:
        """Whether it is a `.py` file outside hidden, foreign and generated folders."""
        folder, data = self._folder, self._options.data
        if file.suffix != ".py" or not file.is_relative_to(folder):
            return False
        names = file.relative_to(folder).parts
        if any(name in _IGNORED_FOLDERS or name.startswith(".") for name in names):
            return False
        # A data folder that holds the project itself cannot be left out.
        return folder.is_relative_to(data) or not file.is_relative_to(data)

    def _reload(self, files: Sequence[Path]) -> None:
        affected = [service for service in self._services if service.spec.reloads]
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        names = ", ".join(service.spec.name for service in affected)
        file = files[0].relative_to(self._folder)
        self._console.say(f"{file}{others} changed: restarting {names}")
        for service in affected:
            service.reload.set()
