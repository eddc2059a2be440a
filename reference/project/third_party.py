"""The third party: a mailing list somewhere on the network, slow and at times broken."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from weakref import WeakKeyDictionary

import httpx

from project.config import get_config

TIMEOUT = 10.0  # seconds

# A client's connections belong to the event loop that they were opened on.
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()


class ThirdPartyError(Exception):
    """The third party did not do what it was asked, and says so again if asked again."""


class TemporaryError(ThirdPartyError):
    """It failed in a way that may pass: worth another try."""


@asynccontextmanager
async def shared_client() -> AsyncIterator[None]:
    """One client for all calls on this event loop: its connections are kept and used again."""
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        _clients[loop] = client
        yield
        _clients.pop(loop, None)


def _client() -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """The shared one, or, where nobody opened it, as in a shell, one for a single call."""
    client = _clients.get(asyncio.get_running_loop())
    return httpx.AsyncClient(timeout=TIMEOUT) if client is None else nullcontext(client)


async def subscribe(email: str) -> None:
    """Put `email` on the list.

    Raises TemporaryError where trying again may help (no connection, time-out, 429, 5xx), and
    ThirdPartyError where it cannot.
    """
    try:
        async with _client() as client:
            response = await client.post(
                f"{get_config().mailing_list_url}/members", json={"email": email}
            )
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        kind = TemporaryError if status == 429 or status >= 500 else ThirdPartyError
        raise kind(f"the mailing list answered {status}") from None
    except httpx.TransportError as error:
        raise TemporaryError(f"the mailing list does not answer: {type(error).__name__}") from error
