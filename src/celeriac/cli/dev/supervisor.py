"""Keeps the services running, starts their processes again, ends them all."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from celeriac.cli.dev.output import Console, Lines
from celeriac.cli.dev.plan import Spec, reachable
from celeriac.cli.dev.watchdog import Watchdog

FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
LIVED_WELL = 10.0

# A stop must fit into five seconds, the embedded Valkey's end and a slow machine's included.
ASK_AGAIN_AFTER = 1.6
KILL_AFTER = 4.0
RESTART_PATIENCE = 4.0


def describe_end(code: int) -> str:
    """A return code for people: `exit code 1` or `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait until they are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _answers(spec: Spec) -> bool:
    """Whether the service's server accepts connections, or gives an HTTP answer, whatever it is."""
    if spec.port is None:
        return True
    try:
        async with asyncio.timeout(20 if spec.http else 2):
            reader, writer = await asyncio.open_connection(reachable(spec.host), spec.port)
            try:
                if not spec.http:
                    return True
                writer.write(b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False


class Child(asyncio.SubprocessProtocol):
    """A running process in a session of its own: its group, its lines, its end."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._lines = Lines(on_line)
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._silent: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        self.pid = transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._lines.feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._lines.finish()
        self._silent.set_result(None)

    def process_exited(self) -> None:
        # Pool processes outlive a main process that was killed.
        self.kill()
        self._ended.set_result(self._transport.get_returncode() or 0)

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """The return code, once it has ended and its last line was read."""
        code = await asyncio.shield(self._ended)
        # Something that left the group may hold the pipe open for ever.
        await asyncio.wait([self._silent], timeout=0.5)
        self._transport.close()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone: its own children are its own to end."""
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process and all of its group at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def end(self, patience: float) -> None:
        """Ask it to end; kill it after `patience` seconds."""
        self.signal(signal.SIGTERM)
        if not (await asyncio.wait([self._ended], timeout=patience))[0]:
            self.kill()
        await self.wait()


class Supervisor:
    """All child processes of the runner, those that finish their work included."""

    def __init__(self, console: Console, watchdog: Watchdog) -> None:
        self.console = console
        self.watchdog = watchdog
        self.env: Mapping[str, str] = os.environ
        self._children: dict[Child, Spec] = {}
        self._draining: set[Child] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def spawn(
        self, spec: Spec, command: Sequence[str], on_line: Callable[[str], None]
    ) -> Child:
        """Start a process of `spec`. Raises OSError where that fails."""
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: Child(on_line),
            *command,
            env={**self.env, **spec.env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the runner alone
        )
        self.watchdog.add(child.pid, "worker" if spec.worker else "process")
        self._children[child] = spec
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

    def watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in a task that ends with the supervisor; its failure is printed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._work_done)

    def _work_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.console.say(f"internal error: {type(error).__name__}: {error}")

    async def replace(self, child: Child, spec: Spec) -> None:
        """Make room for a new process. A worker finishes what it runs, however long that takes."""
        if spec.worker:
            self._draining.add(child)
            child.signal(signal.SIGTERM)
            self.watch(self._drained(child, spec.name))
        else:
            # Two web servers cannot have one port, and two beats double every task.
            await child.end(RESTART_PATIENCE)

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
        await cancel(*self._tasks)
        children = dict(self._children)
        first = {child: spec for child, spec in children.items() if not spec.extra}
        for child in first.keys() - self._draining:
            child.signal(signal.SIGTERM)
        if not await self._gone(first, ASK_AGAIN_AFTER, hurry):
            for child, spec in first.items():
                if spec.worker:
                    # Celery's cold shutdown: running tasks with late acknowledgement are put back.
                    child.signal(signal.SIGQUIT)
            await self._gone(first, KILL_AFTER - ASK_AGAIN_AFTER, hurry)
        last = children.keys() - first.keys()
        for child in last:
            child.signal(signal.SIGTERM)
        await self._gone(last, 0.5, hurry)
        for child in children:
            if child.running:
                child.kill()
        await self._gone(children, 0.5, asyncio.Event())
        for child in children:
            self.watchdog.remove(child.pid)

    async def _gone(self, children: Iterable[Child], timeout: float, hurry: asyncio.Event) -> bool:
        everyone: asyncio.Future[Any] = asyncio.gather(*[child.wait() for child in children])
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait(
            [everyone, hurried], timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )
        gone = everyone.done()
        await cancel(everyone, hurried)
        return gone


class Service:
    """One service: a process at a time, started again when it dies or when the code changes."""

    def __init__(self, spec: Spec, supervisor: Supervisor) -> None:
        self.spec = spec
        self.state = "starting"
        self.ready = asyncio.Event()
        self.reload = asyncio.Event()  # set it for a new process; it is cleared when that starts
        self._supervisor = supervisor
        self._generation = 0
        self._said = asyncio.Event()

    async def run(self) -> None:
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            born = loop.time()
            reason = await self._one_process()
            if reason is None or loop.time() - born > LIVED_WELL:
                delay = FIRST_DELAY
            if reason is None:
                continue
            self.state = f"failed: {reason}"
            self._supervisor.console.say(
                f"{self.spec.name} ended ({reason}); starting it again in {delay:g} s"
            )
            try:
                await asyncio.wait_for(self.reload.wait(), delay)
                delay = FIRST_DELAY
            except TimeoutError:
                delay = min(delay * 2, LONGEST_DELAY)

    async def _one_process(self) -> str | None:
        """Start a process and wait for its end. None when a reload ended it, else why it ended."""
        command = self._next_command()
        for event in (self.reload, self._said, self.ready):
            event.clear()
        if not self.state.startswith("failed"):
            self.state = "starting"
        try:
            child = await self._supervisor.spawn(self.spec, command, self._line)
        except OSError as error:
            return error.strerror or str(error)
        end = asyncio.create_task(child.wait())
        reload = asyncio.create_task(self.reload.wait())
        readiness = asyncio.create_task(self._until_ready(child))
        try:
            await asyncio.wait([end, reload], return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                return describe_end(end.result())
            await self._supervisor.replace(child, self.spec)
            return None
        finally:
            self.ready.clear()
            await cancel(end, reload, readiness)

    def _next_command(self) -> list[str]:
        first = self._generation == 0
        self._generation += first or self.reload.is_set()
        suffix = f".{self._generation}" if self._generation > 1 else ""
        command = [word.replace("{generation}", suffix) for word in self.spec.command]
        return [*command, *self.spec.first_time] if first else command

    def _line(self, line: str) -> None:
        if self.spec.says and re.search(self.spec.says, line):
            self._said.set()
        self._supervisor.console.line(self.spec.name, line)

    async def _until_ready(self, child: Child) -> None:
        if self.spec.says:
            await self._said.wait()
        # A server cannot tell us when it listens.
        while not await _answers(self.spec):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if child.running:
            self.state = "ready"
            self.ready.set()
