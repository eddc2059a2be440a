"""Ends what the runner started, should the runner itself be killed.

The file is both ends: `Watchdog` in the runner, `main` in a small process that holds the read end
of a pipe. That process starts with nothing but the standard library, so keep the imports few.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GRACE = 1.5
KILL_AFTER = 3.0


def _tell(groups: Iterable[int], number: int, *, all_of_group: bool = False) -> bool:
    """Signal the leaders, or everybody. Whether anybody was there."""
    heard = False
    for group in groups:
        # macOS denies permission for a group in which only the dead are left.
        with suppress(ProcessLookupError, PermissionError):
            (os.killpg if all_of_group else os.kill)(group, number)
            heard = True
    return heard


def _end(groups: dict[int, str]) -> None:
    """End the groups: their leaders are asked, whoever remains is killed."""
    started = time.monotonic()
    workers = [group for group, kind in groups.items() if kind == "worker"]
    # The leader only: a pool process that gets the signal itself fails its task for good.
    _tell(groups, signal.SIGTERM)
    while _tell(groups, 0, all_of_group=True):
        waited = time.monotonic() - started
        if waited > GRACE:
            _tell(workers, signal.SIGQUIT)
            workers = []
        if waited > KILL_AFTER:
            _tell(groups, signal.SIGKILL, all_of_group=True)
        if waited > KILL_AFTER + 1:
            return  # what survives SIGKILL sits in the kernel
        time.sleep(0.02)


def main() -> None:
    """Read lines until the pipe ends, then clean up what the last one named.

    A line is a JSON array: the groups with their kinds, and a directory to remove. A kind is
    `worker`, `server` (the embedded Valkey: ended last) or anything else.
    """
    named: dict[str, str] = {}
    directory = ""
    for line in sys.stdin:
        named, directory = json.loads(line)
    groups = {int(group): kind for group, kind in named.items()}
    _end({group: kind for group, kind in groups.items() if kind != "server"})
    _end({group: kind for group, kind in groups.items() if kind == "server"})
    if directory:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


class Watchdog:
    """The runner's end of the pipe. Starts the process again should somebody kill it.

    `lock` is the descriptor of a locked file: the process holds it too, so that the lock is free
    only when the clean-up is over.
    """

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._groups: dict[int, str] = {}
        self._directory = ""
        self._start()

    def _start(self) -> None:
        read, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[self._lock],
        )
        os.close(read)
        self._tell()

    def _tell(self) -> None:
        with suppress(BrokenPipeError):  # `revive` tells the next one
            os.write(self._pipe, json.dumps([self._groups, self._directory]).encode() + b"\n")

    def add(self, group: int, kind: str) -> None:
        self._groups[group] = kind
        self._tell()

    def remove(self, group: int) -> None:
        if self._groups.pop(group, None) is not None:
            self._tell()

    def remember(self, directory: Path) -> None:
        """Name the directory to remove in the end."""
        self._directory = str(directory)
        self._tell()

    def revive(self) -> bool:
        """Start the process again if it is gone. True if it was."""
        if self._process.poll() is None:
            return False
        os.close(self._pipe)
        self._start()
        return True

    def dismiss(self) -> None:
        """End the process without a clean-up: the runner did it."""
        self._groups, self._directory = {}, ""
        self._tell()
        os.close(self._pipe)
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    main()
