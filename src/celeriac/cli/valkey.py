"""The embedded Valkey as the runner keeps it: started, watched, started again, stopped last."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from celeriac.cli.child import describe_end
from celeriac.cli.output import Console
from celeriac.cli.supervisor import FIRST_DELAY, LONGEST_DELAY
from celeriac.cli.watchdog import Watchdog
from celeriac.embedded import Valkey
from celeriac.errors import CeleriacError

_Result = TypeVar("_Result")


class KeptValkey:
    """A Valkey that lives as long as the runner."""

    def __init__(self, data: Path, console: Console, watchdog: Watchdog) -> None:
        self.server = Valkey(data)
        self.state = "starting"
        self._console = console
        self._watchdog = watchdog
        self._group = 0
        # One thread that stays: the kernel ends the server when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "valkey")
        watchdog.remember(self.server.socket.parent)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        # Shielded: a start that goes on unseen would leave a server behind.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def start(self) -> None:
        """Start it and wait until it answers. Raises ServiceError or RedisNotFoundError."""
        await self._in_thread(self.server.start)
        assert self.server.process is not None
        self._group = self.server.process.pid
        self._watchdog.add(self._group, "server")
        self.state = "ready"

    async def keep(self) -> None:
        """Start it again, on the same socket, whenever it dies."""
        delay = FIRST_DELAY
        while True:
            process = self.server.process
            if process is not None and process.poll() is None:
                await asyncio.sleep(0.1)
                continue
            reason = describe_end(process.returncode) if process is not None else self.state
            self._console.say(f"redis ended ({reason}); starting it again")
            self._watchdog.remove(self._group)
            try:
                await self._in_thread(self.server.stop)
                await self.start()
                self._console.say("redis is back")
                delay = FIRST_DELAY
            except (CeleriacError, OSError) as error:
                self.state = f"failed: {error}"
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_DELAY)

    async def close(self) -> None:
        """Stop it and remove its socket. Its data stays."""
        if (process := self.server.process) is not None:
            process.terminate()  # from here: its thread may be waiting for a start
        await self._in_thread(lambda: self.server.stop(timeout=0.6))
        await self._in_thread(self.server.close)
        self._watchdog.remove(self._group)
        self._thread.shutdown()
