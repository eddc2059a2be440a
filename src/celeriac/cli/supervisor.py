"""Keeps the services running, starts their processes again, ends them all."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from celeriac.cli.child import Child, describe_end
from celeriac.cli.output import Console
from celeriac.cli.watchdog import Watchdog

FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
LIVED_WELL = 10.0

# The whole stop must fit into five seconds, the embedded Valkey's end included.
ASK_AGAIN_AFTER = 2.0
KILL_AFTER = 4.4
RESTART_PATIENCE = 4.0


async def _at_once() -> bool:
    return True


@dataclass(frozen=True)
class Spec:
    """What a service is. `{generation}` in a command grows by one with every reload, `first_time`
    is added when the service is started for the first time.

    It is ready when `answers` says so or, where given, when a line satisfies `says`.
    `early`: needs no checked application and no migrated database.
    `overlaps`: on reload the old process finishes its work while the new one has already begun.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    address: str = "-"
    answers: Callable[[], Awaitable[bool]] = _at_once
    says: Callable[[str], bool] | None = None
    reloads: bool = False
    overlaps: bool = False
    early: bool = False
    first_time: tuple[str, ...] = ()
    kind: str = "process"

    def command_of(self, generation: int) -> list[str]:
        suffix = f".{generation}" if generation > 1 else ""
        return [word.replace("{generation}", suffix) for word in self.command]


class Supervisor:
    """All child processes of the runner, the draining ones included."""

    def __init__(self, console: Console, watchdog: Watchdog) -> None:
        self.console = console
        self.watchdog = watchdog
        self._children: dict[Child, str] = {}
        self._draining: set[Child] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def spawn(
        self, spec: Spec, command: Sequence[str], on_line: Callable[[str], None]
    ) -> Child:
        child = await Child.spawn(command, spec.env, on_line)
        self.watchdog.add(child.pid, spec.kind)
        self._children[child] = spec.kind
        self.watch(self._forget(child))
        return child

    async def _forget(self, child: Child) -> None:
        try:
            await child.wait()
        finally:
            if not child.running:
                self._children.pop(child, None)
                self._draining.discard(child)
                self.watchdog.remove(child.pid)

    def watch(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Run `work` in a task that ends with the supervisor; its failure is printed."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._work_done)
        return task

    def _work_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.console.say(f"internal error: {type(error).__name__}: {error}")

    def drain(self, child: Child, name: str) -> None:
        """Let a worker finish what it runs, however long that takes."""
        self._draining.add(child)
        child.signal(signal.SIGTERM)
        self.watch(self._drained(child, name))

    async def _drained(self, child: Child, name: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        code = await child.wait()
        if self._stopping:
            return
        if code not in (0, -signal.SIGTERM):
            self.console.say(f"the old {name} ended ({describe_end(code)})")
        elif loop.time() - began > 3:
            self.console.say(f"the old {name} has finished its tasks")

    async def stop(self, hurry: asyncio.Event) -> None:
        """End every process: asked, asked again, killed. At once when `hurry` is set."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        children = dict(self._children)
        for child in children.keys() - self._draining:
            child.signal(signal.SIGTERM)
        workers = [child for child, kind in children.items() if kind == "worker"]
        if not await self._gone(children, ASK_AGAIN_AFTER, hurry):
            # Celery's cold shutdown: running tasks with late acknowledgement are put back.
            for worker in workers:
                worker.signal(signal.SIGQUIT)
            await self._gone(children, KILL_AFTER - ASK_AGAIN_AFTER, hurry)
        for child in children:
            if child.running:
                child.kill()
        await self._gone(children, 0.5, None)
        for child in children:
            self.watchdog.remove(child.pid)

    async def _gone(
        self, children: Iterable[Child], timeout: float, hurry: asyncio.Event | None
    ) -> bool:
        everyone = asyncio.gather(*[child.wait() for child in children])
        waits: set[asyncio.Future[object]] = {everyone}  # type: ignore[arg-type]
        if hurry is not None:
            waits.add(asyncio.ensure_future(hurry.wait()))
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        gone = everyone.done()
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        return gone


class Service:
    """One service: a process at a time, started again when it dies or when the code changes."""

    def __init__(self, spec: Spec, supervisor: Supervisor) -> None:
        self.spec = spec
        self.state = "starting"
        self.ready = asyncio.Event()
        self._supervisor = supervisor
        self._reload = asyncio.Event()
        self._generation = 0
        self._said = asyncio.Event()

    def reload(self) -> None:
        """Start a new process soon; several calls before it happens are one."""
        self._reload.set()

    async def run(self) -> None:
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            born = loop.time()
            reason = await self._one_process()
            if reason is None:
                delay = FIRST_DELAY
                continue
            if loop.time() - born > LIVED_WELL:
                delay = FIRST_DELAY
            self.state = f"failed: {reason}"
            self._supervisor.console.say(
                f"{self.spec.name} ended ({reason}); starting it again in {delay:g} s"
            )
            if await self._reload_within(delay):
                delay = FIRST_DELAY
            else:
                delay = min(delay * 2, LONGEST_DELAY)

    async def _reload_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._reload.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _one_process(self) -> str | None:
        """Start a process and wait for its end. None when a reload ended it, else why it ended."""
        command = self._next_command()
        self._reload.clear()
        self._said.clear()
        self.ready.clear()
        if not self.state.startswith("failed"):
            self.state = "starting"
        try:
            child = await self._supervisor.spawn(self.spec, command, self._line)
        except OSError as error:
            return error.strerror or str(error)
        work = [
            asyncio.create_task(self._until_ready(child)),
            asyncio.create_task(self._reload.wait()),
        ]
        end = asyncio.create_task(child.wait())
        try:
            await asyncio.wait([end, work[1]], return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                return describe_end(end.result())
            await self._replace(child)
            return None
        finally:
            self.ready.clear()
            for task in (*work, end):
                task.cancel()
            await asyncio.gather(*work, end, return_exceptions=True)

    def _next_command(self) -> list[str]:
        if not self._generation:
            self._generation = 1
            return [*self.spec.command_of(1), *self.spec.first_time]
        self._generation += self._reload.is_set()
        return self.spec.command_of(self._generation)

    async def _replace(self, child: Child) -> None:
        if self.spec.overlaps:
            self._supervisor.drain(child, self.spec.name)
        else:
            # Two web servers cannot have one port, and two beats double every task.
            await child.end(RESTART_PATIENCE)

    def _line(self, line: str) -> None:
        if self.spec.says is not None and self.spec.says(line):
            self._said.set()
        self._supervisor.console.line(self.spec.name, line)

    async def _until_ready(self, child: Child) -> None:
        if self.spec.says is not None:
            await self._said.wait()
        # A server cannot tell us when it listens.
        while not await self.spec.answers():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if child.running:
            self.state = "ready"
            self.ready.set()
