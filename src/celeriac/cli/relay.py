"""`celeriac relay`: send what processes that died have left in the outbox."""

import asyncio
import signal
from typing import TYPE_CHECKING

import click

from celeriac.cli.apps import app_option, load
from celeriac.errors import exit_on_error

if TYPE_CHECKING:
    from celery import Celery


@click.command()
@app_option
def relay(path: str) -> None:
    """Send what is left in the outbox, until SIGTERM. Any number of relays may run."""
    with exit_on_error():
        asyncio.run(_relay(load(path)))


async def _relay(app: "Celery") -> None:
    from celeriac.relay import run

    relaying = asyncio.create_task(run(app))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relaying.cancel)
    loop.call_soon(print, "relay: sends what is left in the outbox")
    await asyncio.wait([relaying])
    if not relaying.cancelled():
        relaying.result()
