"""One child process: its group, its lines, its end."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from celeriac.cli.output import Lines


def describe_end(code: int) -> str:
    """A return code for people: `exit code 1` or `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Child(asyncio.SubprocessProtocol):
    """A running process in a session of its own. Make it with `spawn`."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._lines = Lines(on_line)
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._silent: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.SubprocessTransport | None = None
        self.pid = 0

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        on_line: Callable[[str], None],
    ) -> "Child":
        """Start `command`. Raises OSError where that fails."""
        loop = asyncio.get_running_loop()
        _, child = await loop.subprocess_exec(
            lambda: cls(on_line),
            *command,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the runner alone
        )
        return child

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        self.pid = transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._lines.feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._lines.finish()
        if not self._silent.done():
            self._silent.set_result(None)
        self._close_after_end()

    def process_exited(self) -> None:
        assert self._transport is not None
        # Pool processes outlive a main process that was killed.
        self.kill()
        if not self._ended.done():
            self._ended.set_result(self._transport.get_returncode() or 0)
        self._close_after_end()

    def _close_after_end(self) -> None:
        if self._transport is not None and self._ended.done() and self._silent.done():
            self._transport.close()

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int:
        """The return code, once it has ended and its last line was read."""
        code = await asyncio.shield(self._ended)
        # Something that left the group may hold the pipe open for ever.
        await asyncio.wait([self._silent], timeout=0.5)
        if self._transport is not None:
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

    async def end(self, patience: float) -> int:
        """Ask it to end; kill it after `patience` seconds."""
        self.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self._ended], timeout=patience)
        if not done:
            self.kill()
        return await self.wait()
