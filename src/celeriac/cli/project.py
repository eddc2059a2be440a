"""What the project says of itself: `[tool.celeriac.dev]` in pyproject.toml, and `.env`."""

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celeriac.errors import ConfigurationError

_TABLE = "tool.celeriac.dev.processes"
_KEYS = {"command": str, "port": int, "env": dict}


@dataclass(frozen=True)
class ExtraProcess:
    """A process of the project's own. `env` is for every process."""

    name: str
    command: tuple[str, ...]
    port: int | None
    env: Mapping[str, str]


def user_settings(folder: Path) -> dict[str, str]:
    """What the user set in the environment or in `.env`; the environment wins."""
    from dotenv import dotenv_values

    values = {**dotenv_values(folder / ".env"), **os.environ}
    return {name: value for name, value in values.items() if value}


def extra_processes(folder: Path, shift: int, taken: Collection[str]) -> list[ExtraProcess]:
    """The processes that pyproject.toml adds, their ports moved by `shift`.

    Raises ConfigurationError naming the wrong key.
    """
    try:
        text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except FileNotFoundError:
        return []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"pyproject.toml is not TOML: {error}") from None
    section: Any = content
    for key in ("tool", "celeriac", "dev"):
        section = section.get(key, {})
        if not isinstance(section, dict):
            raise ConfigurationError(f"pyproject.toml: {key} must be a table, got {section!r}")
    _refuse_unknown(section, {"processes"}, "tool.celeriac.dev")
    tables = section.get("processes", {})
    if not isinstance(tables, dict):
        raise ConfigurationError(f"pyproject.toml: {_TABLE} must be a table, got {tables!r}")
    return [_extra_process(name, table, shift, taken) for name, table in tables.items()]


def _refuse_unknown(table: Mapping[str, object], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            expected = ", ".join(known)
            raise ConfigurationError(
                f"pyproject.toml: unknown key {where}.{key}, expected {expected}"
            )


def _extra_process(name: str, table: Any, shift: int, taken: Collection[str]) -> ExtraProcess:
    where = f"{_TABLE}.{name}"
    if not isinstance(table, dict):
        raise ConfigurationError(f"pyproject.toml: {where} must be a table, got {table!r}")
    if name in taken:
        raise ConfigurationError(f"pyproject.toml: {where}: the name {name} is taken, rename it")
    _refuse_unknown(table, _KEYS, where)
    for key, kind in _KEYS.items():
        if key in table and type(table[key]) is not kind:
            got = f"got {table[key]!r}"
            expected = {"str": "a string", "int": "a number", "dict": "a table"}[kind.__name__]
            raise ConfigurationError(f"pyproject.toml: {where}.{key} must be {expected}, {got}")
    port = _port(table, shift, where)
    return ExtraProcess(
        name=name,
        command=_command(table.get("command", ""), port, where),
        port=port,
        env={key: _env(value, port, f"{where}.env.{key}") for key, value in _items(table)},
    )


def _items(table: Mapping[str, Any]) -> list[tuple[str, object]]:
    return list(table.get("env", {}).items())


def _port(table: Mapping[str, Any], shift: int, where: str) -> int | None:
    if "port" not in table:
        return None
    port = int(table["port"]) + shift
    if not 0 < port < 65536:
        raise ConfigurationError(f"pyproject.toml: {where}.port comes to {port}, not a port number")
    return port


def _command(command: str, port: int | None, where: str) -> tuple[str, ...]:
    try:
        words = shlex.split(_with_port(command, port, f"{where}.command"))
    except ValueError as error:
        raise ConfigurationError(f"pyproject.toml: {where}.command: {error}") from None
    if not words:
        raise ConfigurationError(f"pyproject.toml: {where}.command is missing: give one")
    if words[0] == "python":
        words[0] = sys.executable  # a shell's own PATH may know another
    if shutil.which(words[0]) is None:
        raise ConfigurationError(f"pyproject.toml: {where}.command: {words[0]} is not found")
    return tuple(words)


def _env(value: object, port: int | None, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"pyproject.toml: {where} must be a string, got {value!r}")
    return _with_port(value, port, where)


def _with_port(text: str, port: int | None, where: str) -> str:
    # Not str.format: a command may hold braces of its own.
    if "{port}" not in text:
        return text
    if port is None:
        raise ConfigurationError(f"pyproject.toml: {where} uses {{port}}, but no port is given")
    return text.replace("{port}", str(port))
