"""Ends what the runner started, should the runner itself be killed.

The file is both ends: `Watchdog` in the runner, `main` in a small process that holds the read end
of a pipe. That process starts with nothing but the standard library, so keep the imports few.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE = 1.5
KILL_AFTER = 3.0


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # macOS says so of a group in which only the dead are left
    return True


def _end(groups: dict[int, str]) -> None:
    """End the groups: their leaders are asked, whoever remains is killed."""
    started = time.monotonic()
    asked = False
    # The leader only: a pool process that gets the signal itself fails its task for good.
    _tell(groups, signal.SIGTERM)
    while any(map(_alive, groups)):
        waited = time.monotonic() - started
        if waited > GRACE and not asked:
            asked = True
            _tell([group for group, kind in groups.items() if kind == "worker"], signal.SIGQUIT)
        if waited > KILL_AFTER:
            for group in groups:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            if waited > KILL_AFTER + 1:
                return  # what survives SIGKILL sits in the kernel
        time.sleep(0.02)


def _tell(leaders: "dict[int, str] | list[int]", number: signal.Signals) -> None:
    for leader in leaders:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(leader, number)


def main() -> None:
    """Read `+ GROUP KIND`, `- GROUP`, `directory PATH`, `done` until the pipe ends; then clean up.

    KIND is `worker`, `server` (the embedded Valkey: ended last) or anything else.
    """
    groups: dict[int, str] = {}
    directory = ""
    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        if verb == "+":
            group, _, kind = rest.partition(" ")
            groups[int(group)] = kind
        elif verb == "-":
            groups.pop(int(rest), None)
        elif verb == "directory":
            directory = rest
        elif verb == "done":
            return
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
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[self._lock],
        )
        known = [f"+ {group} {kind}" for group, kind in self._groups.items()]
        self._write("\n".join([f"directory {self._directory}", *known]))

    def _write(self, text: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `revive` tells the next one
            os.write(self._process.stdin.fileno(), f"{text}\n".encode())

    def add(self, group: int, kind: str) -> None:
        self._groups[group] = kind
        self._write(f"+ {group} {kind}")

    def remove(self, group: int) -> None:
        if self._groups.pop(group, None) is not None:
            self._write(f"- {group}")

    def remember(self, directory: Path) -> None:
        """Name the directory to remove in the end."""
        self._directory = str(directory)
        self._write(f"directory {directory}")

    def revive(self) -> bool:
        """Start the process again if it is gone. True if it was."""
        assert self._process is not None
        if self._process.poll() is None:
            return False
        self._close()
        self._start()
        return True

    def dismiss(self) -> None:
        """End the process without a clean-up: the runner did it."""
        assert self._process is not None
        self._write("done")
        self._close()

    def _close(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    main()
