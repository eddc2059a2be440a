"""Run coroutines against each other."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def until_first(**coroutines: Coroutine[Any, Any, None]) -> None:
    """Run them as tasks of these names until the first ends; the others are cancelled.

    Raises what ended one of them.
    """
    tasks = [
        asyncio.create_task(each, name=f"celeriac-{name}") for name, each in coroutines.items()
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
