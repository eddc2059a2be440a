"""How other threads call a worker's main loop."""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Bell:
    """Has `answer` called in the next turn of a worker's main loop, rung from any thread.

    kombu's own `call_soon` is no substitute on the main thread: what is added during a turn, as an
    acknowledgement is, would wait for the poll that follows.
    """

    def __init__(self, answer: Callable[[], object]) -> None:
        self._answer = answer
        self._heard, self._rung = socket.socketpair()
        self._heard.setblocking(False)
        self._rung.setblocking(False)
        self._ringing = False

    def hang_in(self, hub: Any) -> None:
        """Listen with `hub`, kombu's; again after each loss of the broker, when it forgets."""
        hub.add_reader(self._heard, self._hear)

    def ring(self) -> None:
        if not self._ringing:
            self._ringing = True
            with suppress(OSError):  # closed, or full: then it is heard anyway
                self._rung.send(b"\0")

    def _hear(self) -> None:
        with suppress(OSError):
            self._heard.recv(4096)
        self._ringing = False
        self._answer()

    def close(self) -> None:
        self._heard.close()
        self._rung.close()
