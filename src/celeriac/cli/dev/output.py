"""What the runner prints: the lines of its children, its own remarks, one table."""

import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence

LONGEST_LINE = 64 * 1024
_QUEUED_LINES = 20_000
_COLOURS = (36, 32, 35, 34, 33, 96, 92, 95, 94)
_OWN_NAME = "celeriac"


class Lines:
    """Cuts a stream of bytes into lines: invalid UTF-8 replaced, over-long lines cut in pieces."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) >= LONGEST_LINE:
            lines.append(self._rest[:LONGEST_LINE])
            self._rest = self._rest[LONGEST_LINE:]
        for line in lines:
            self._on_line(line.decode(errors="replace").rstrip("\r"))

    def finish(self) -> None:
        """The stream is over: what has no end of line is a line too."""
        if self._rest:
            self.feed(b"\n")


def coloured() -> bool:
    """Whether somebody looks at a terminal and wants colours there."""
    return os.isatty(1) and not os.environ.get("NO_COLOR")


class Console:
    """Standard output, shared by all. Never blocks: a thread writes.

    A terminal on hold or a full pipe must not stop the event loop, nor the children, so beyond
    a bound lines are dropped and counted. `on_closed` is called, in that thread, when nobody
    reads any more.
    """

    def __init__(self, names: Iterable[str], on_closed: Callable[[], object]) -> None:
        self._coloured = coloured()
        self._width = max(map(len, [*names, _OWN_NAME]))
        self._on_closed = on_closed
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUED_LINES)
        self._dropped = 0
        self._held: list[tuple[str, str]] | None = []
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Show the children's lines, which were kept back until now."""
        held, self._held = self._held, None
        for name, text in held or ():
            self.line(name, text)

    def line(self, name: str, text: str) -> None:
        """One line of the child `name`."""
        if self._held is not None and name != _OWN_NAME:
            self._held.append((name, text))
            return
        if self._dropped and not self._queue.full():
            dropped, self._dropped = self._dropped, 0
            self.say(f"{dropped} lines were dropped: this output is read too slowly")
        try:
            self._queue.put_nowait(f"{self._prefix(name)}{text}\n".encode(errors="replace"))
        except queue.Full:
            self._dropped += 1

    def say(self, text: str) -> None:
        """A remark of the runner itself."""
        self.line(_OWN_NAME, text)

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        cells = [("name", "address", "state"), *rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            self.say("  ".join(padded).rstrip())

    def close(self, timeout: float = 0.3) -> None:
        """Write what waits, as far as somebody takes it."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _prefix(self, name: str) -> str:
        padded = name.ljust(self._width)
        if not self._coloured:
            return f"{padded} | "
        # Not by order of appearance: a name keeps its colour whatever else is started.
        colour = 1 if name == _OWN_NAME else _COLOURS[zlib.crc32(name.encode()) % len(_COLOURS)]
        return f"\x1b[{colour}m{padded} |\x1b[0m "

    def _run(self) -> None:
        # Not sys.stdout: a thread stuck inside its lock would abort the interpreter's exit.
        while (chunk := self._queue.get()) is not None:
            while chunk:
                try:
                    chunk = chunk[os.write(1, chunk) :]
                except BlockingIOError:
                    time.sleep(0.02)  # somebody made our terminal non-blocking
                except OSError:
                    self._on_closed()
                    return
