"""TCP ports: are they free, does somebody answer."""

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from celeriac.errors import ConfigurationError


@dataclass(frozen=True)
class Port:
    number: int
    owner: str
    remedy: str
    host: str = "127.0.0.1"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable(host: str) -> str:
    """The address at which a server that listens on `host` is met from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104


def url(host: str, port: int) -> str:
    shown = reachable(host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def check_free(ports: Sequence[Port]) -> None:
    """Raise ConfigurationError for the first port that cannot be listened on."""
    owners: dict[int, str] = {}
    for port in ports:
        if not 0 < port.number < 65536:
            raise ConfigurationError(f"{port.owner}: {port.number} is not a port; {port.remedy}")
        if port.number in owners:
            both = f"{owners[port.number]} and {port.owner}"
            raise ConfigurationError(f"port {port.number} is meant for {both}; {port.remedy}")
        owners[port.number] = port.owner
        _check_one(port)


def _check_one(port: Port) -> None:
    what = f"port {port.number} ({port.owner})"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            port.host, port.number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the servers do: connections that linger after a restart are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"{what} is taken by another program; {port.remedy}") from None
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigurationError(
            f"{what} cannot be used on {port.host}: {reason}; {port.remedy}, or another --host"
        ) from None


async def accepts(host: str, port: int) -> bool:
    """Whether a server accepts connections."""
    return await _ask(host, port, b"", 2)


async def speaks_http(host: str, port: int) -> bool:
    """Whether a server gives an HTTP answer, whatever it says."""
    return await _ask(host, port, b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n", 20)


async def _ask(host: str, port: int, request: bytes, timeout: float) -> bool:
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(reachable(host), port)
            try:
                if not request:
                    return True
                writer.write(request)
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
