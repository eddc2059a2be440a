"""Watches the project's Python files."""

import asyncio
from collections.abc import Callable
from pathlib import Path

_IGNORED = {"__pycache__", "node_modules", "venv", "site-packages"}


class Filter:
    """Says which changes count: `.py` files outside hidden, foreign and generated folders."""

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder = folder
        self._data = data

    def __call__(self, change: object, path: str) -> bool:
        if not path.endswith(".py"):
            return False
        file = Path(path)
        if not file.is_relative_to(self._folder):
            return False
        names = file.relative_to(self._folder).parts
        if any(name in _IGNORED or name.startswith(".") for name in names):
            return False
        # A data folder that holds the project itself cannot be left out.
        inside = self._data.is_relative_to(self._folder) and self._data != self._folder
        return not (inside and file.is_relative_to(self._data))


async def watch(folder: Path, data: Path, on_change: Callable[[list[str]], None]) -> None:
    """Call `on_change` with the changed files, relative to `folder`; never returns by itself."""
    from watchfiles import awatch

    stop = asyncio.Event()
    try:
        async for changes in awatch(
            folder,
            watch_filter=Filter(folder, data),
            debounce=400,
            stop_event=stop,
            ignore_permission_denied=True,
        ):
            files = {str(Path(path).relative_to(folder)) for _, path in changes}
            on_change(sorted(files))
    finally:
        stop.set()  # its thread looks at nothing else
