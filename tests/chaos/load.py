"""Tasks that keep coming while something fails, from a thread, as a web application sends them."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from celeriac import PublishError, asend_task
from chaos.stage import Stage

AHEAD = 60  # tasks that wait at most: what comes back has its turn at once


class Load:
    """`sent` has what the broker has accepted: the key of each task, and its id.

    Half of the bodies are synchronous. `longest` is the limit, in seconds, of how long they take.
    """

    def __init__(
        self,
        play: Stage,
        rng: random.Random,
        *,
        least: int = 0,
        longest: float = 0.1,
        ahead: int = AHEAD,
    ) -> None:
        self.play, self.random, self.least = play, rng, least
        self.longest, self.ahead = longest, ahead
        self.sent: dict[str, str] = {}
        self.refused = 0
        self.seconds: dict[str, float] = {}  # that the body takes
        self._stopping = threading.Event()

    async def _send_all(self) -> None:
        number = 0
        while self._goes_on():
            if number % 10 == 0:
                await asyncio.to_thread(self._wait_for_room)
            key, task_id = f"t{number}", uuid4().hex
            self.seconds[key] = self.random.uniform(0.005, self.longest)
            name = "chaos_app.work" if number % 2 else "chaos_app.awork"
            number += 1
            try:
                arguments = key, self.seconds[key]
                await asend_task(self.play.client, name, arguments, task_id=task_id)
            except PublishError:
                self.refused += 1
            else:
                self.sent[key] = task_id

    def _goes_on(self) -> bool:
        return not self._stopping.is_set() or len(self.sent) < self.least

    def _wait_for_room(self) -> None:
        while self._goes_on():
            if len(self.sent.keys() - self.play.ledger.ended()) < self.ahead:
                return
            time.sleep(0.05)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sends in the block, and after it until it has sent the least."""
        thread = threading.Thread(
            target=lambda: asyncio.run(self._send_all()), name="load", daemon=True
        )
        thread.start()
        try:
            yield
        except BaseException:
            self.least = 0
            raise
        finally:
            self._stopping.set()
            thread.join(600)
        assert not thread.is_alive()
