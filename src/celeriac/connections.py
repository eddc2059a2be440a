"""How the connections of an event loop to Redis end."""

from contextlib import suppress

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError


async def disconnect(connection: AbstractConnection) -> None:
    """Let go of it within a turn of the loop, which may be the last one.

    Over TLS closing waits for the other side's goodbye, and the socket stays open until then.
    """
    writer = getattr(connection, "_writer", None)
    with suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
    if writer is not None and writer.get_extra_info("ssl_object") is not None:
        writer.transport.abort()
