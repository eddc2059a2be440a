"""The runner's data folder, and that only one runner uses it."""

import fcntl
import os
import time
from pathlib import Path

from celeriac.errors import ConfigurationError

# The watchdog of a runner that was killed holds the lock until its clean-up is over.
_CLEAN_UP = 6.0


class DataFolder:
    """A locked folder. The lock ends with `close` and with every holder of `descriptor`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.exists():
                path.mkdir(parents=True)
                (path / ".gitignore").write_text("*\n")  # it holds secrets
            self.descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigurationError(
                f"cannot use the data folder {path}: {reason}; choose another with --data"
            ) from None
        self._lock()

    def _lock(self) -> None:
        deadline = time.monotonic() + _CLEAN_UP
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(self.descriptor, 32, 0).decode(errors="replace").strip()
                if time.monotonic() < deadline and not _alive(holder):
                    time.sleep(0.05)
                    continue
            os.close(self.descriptor)
            raise ConfigurationError(
                f"the data folder {self.path} is in use by another celeriac dev (pid {holder}); "
                "end that one, or choose another folder with --data"
            )
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self.descriptor)


def _alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False  # just locked, not yet written
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
