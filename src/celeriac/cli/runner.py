"""One run of `celeriac dev`: check, start, watch, stop."""

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from celeriac.cli import plan, probe, services
from celeriac.cli.child import describe_end
from celeriac.cli.data import DataFolder
from celeriac.cli.output import Console
from celeriac.cli.plan import Options
from celeriac.cli.project import ExtraProcess
from celeriac.cli.reload import watch
from celeriac.cli.supervisor import Service, Spec, Supervisor
from celeriac.cli.valkey import KeptValkey
from celeriac.cli.watchdog import Watchdog
from celeriac.errors import ConfigurationError

_TABLE_AFTER = 60.0
_SLOW_CHECK = 5.0


def _bytecode_cache(data: Path) -> dict[str, str]:
    """Variables that give the children compiled modules where the environment has none.

    Five processes that each compile all they import make 13 s of a start that takes 4 s.
    """
    celery = find_spec("celery")
    compiled = celery is not None and celery.cached is not None and Path(celery.cached).exists()
    if compiled or not os.environ.get("PYTHONDONTWRITEBYTECODE"):
        return {}
    # Nothing is written beside the sources, as the user wishes.
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(data / "pycache")}


class Runner:
    """Everything that one run holds. `run` returns after the processes are gone."""

    def __init__(
        self,
        options: Options,
        extras: Sequence[ExtraProcess],
        user: Mapping[str, str],
        data: DataFolder,
    ) -> None:
        self._options = options
        self._user = user
        self._extras = extras
        self._data = data
        self._folder = Path.cwd()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._handle_signals()
        names = [
            spec.name for spec in plan.services(options, extras, {}, colour=False, alone=False)
        ]
        self._console = Console(names, self._on_closed_output)
        self._watchdog = Watchdog(data.descriptor)
        self._supervisor = Supervisor(self._console, self._watchdog)
        self._valkey: KeptValkey | None = None
        self._services: list[Service] = []

    def _handle_signals(self) -> None:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup wants it ignored
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals | None) -> None:
        if self._stop.is_set() and number is signal.SIGINT:
            self._hurry.set()
        self._stop.set()

    def _on_closed_output(self) -> None:
        self._loop.call_soon_threadsafe(self._on_signal, None)

    async def run(self) -> None:
        """Raises CeleriacError where the start fails; whatever was started is ended first."""
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                self._console.say("stopping")
        finally:
            work.cancel()
            stop.cancel()
            done = await asyncio.gather(work, stop, return_exceptions=True)
            await self._end()
        if isinstance(done[0], Exception):
            raise done[0]

    async def _end(self) -> None:
        await self._supervisor.stop(self._hurry)
        if self._valkey is not None:
            await self._valkey.close()
        (self._data.path / "env").unlink(missing_ok=True)  # its addresses are gone
        self._watchdog.dismiss()
        self._console.close()

    async def _work(self) -> None:
        variables = self._variables()
        services.write_env_file(self._data.path / "env", variables)
        if self._valkey is not None:
            await self._valkey.start()
        await asyncio.to_thread(services.check_servers, self._user)
        await self._start_services(self._environment(variables))
        self._supervisor.watch(self._keep_watchdog())
        self._supervisor.watch(self._show_table(variables))
        if self._valkey is not None:
            self._supervisor.watch(self._valkey.keep())
        if self._options.reload:
            await self._watch_files()
        await self._stop.wait()

    def _variables(self) -> dict[str, str]:
        """What the children get beside the user's own settings."""
        folder, data = self._folder, self._data.path
        if services.needs_valkey(self._user):
            self._valkey = KeptValkey(data / "valkey", self._console, self._watchdog)
        server = self._valkey.server if self._valkey is not None else None
        variables = services.redis_variables(self._user, server)
        variables |= services.database_variables(self._user, folder, data)
        for extra in self._extras:
            new = {name: value for name, value in extra.env.items() if name not in self._user}
            variables |= new
        return variables

    async def _start_services(self, env: Mapping[str, str]) -> None:
        colour, alone = self._console.coloured, self._valkey is not None
        specs = plan.services(self._options, self._extras, env, colour=colour, alone=alone)
        self._services = [Service(spec, self._supervisor) for spec in specs]
        early = [service for service in self._services if service.spec.early]
        # They take the second processor while the application is checked; should that fail,
        # nobody wants to read what they say about it.
        self._console.hold()
        for service in early:
            self._supervisor.watch(service.run())
        await self._probe(env)
        self._console.release()
        for service in self._services:
            if service not in early:
                self._supervisor.watch(service.run())

    async def _probe(self, env: Mapping[str, str]) -> None:
        web = self._options.app if self._options.web else ""
        migrate = "migrate" if (self._folder / "alembic.ini").exists() else ""
        lines: list[str] = []
        spec = Spec(
            name="check",
            command=(sys.executable, "-m", probe.__name__, web, self._options.celery, migrate),
            env=env,
        )
        child = await self._supervisor.spawn(spec, spec.command, lines.append)
        end = asyncio.ensure_future(child.wait())
        try:
            if not (await asyncio.wait([end], timeout=_SLOW_CHECK))[0]:
                self._console.say("still importing the application, or migrating its database")
            code = await end
        finally:
            end.cancel()
        if code == 0:
            return
        refusals = [line.removeprefix(probe.MARK) for line in lines if line.startswith(probe.MARK)]
        said = [line for line in lines if line.strip()] or [describe_end(code)]
        # A crash inside the application leaves no refusal: its last word is all there is.
        raise ConfigurationError(refusals[0] if refusals else said[-1])

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        plain = {} if self._console.coloured else {"NO_COLOR": "1"}
        cache = _bytecode_cache(self._data.path)
        return {**os.environ, **variables, **plain, **cache, "PYTHONUNBUFFERED": "1"}

    async def _keep_watchdog(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._watchdog.revive():
                self._console.say("the watchdog was gone; started it again")

    async def _show_table(self, variables: Mapping[str, str]) -> None:
        waits = [asyncio.create_task(service.ready.wait()) for service in self._services]
        try:
            await asyncio.wait(waits, timeout=_TABLE_AFTER)
        finally:
            for wait in waits:
                wait.cancel()
        rows = [(it.spec.name, it.spec.address, it.state) for it in self._services]
        known = {**self._user, **variables}
        redis = known.get(services.BROKER) or known.get(services.REDIS)
        if self._valkey is not None:
            rows.append(("redis", str(self._valkey.server.socket), self._valkey.state))
        elif redis:
            rows.append(("redis", services.shown(redis), "ready"))
        if services.DATABASE in known:
            rows.append(("database", services.shown(known[services.DATABASE]), "ready"))
        self._console.table(rows)
        self._console.say(f"for another shell: . {self._env_file()}    (Ctrl-C ends everything)")

    def _env_file(self) -> str:
        path = self._data.path / "env"
        inside = path.is_relative_to(self._folder)
        return shlex.quote(f"./{path.relative_to(self._folder)}" if inside else str(path))

    async def _watch_files(self) -> None:
        try:
            await watch(self._folder, self._data.path, self._reload)
        except OSError as error:
            self._console.say(
                f"cannot watch the files ({error}), going on without reload; "
                "WATCHFILES_FORCE_POLLING=1 may help"
            )

    def _reload(self, files: Sequence[str]) -> None:
        affected = [service for service in self._services if service.spec.reloads]
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        names = ", ".join(service.spec.name for service in affected)
        self._console.say(f"{files[0]}{others} changed: restarting {names}")
        for service in affected:
            service.reload()
