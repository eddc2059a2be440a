"""The third party: a mailing list somewhere on the network, slow and at times broken."""

import httpx

from project.config import get_config

TIMEOUT = 10.0  # seconds


class TemporaryError(Exception):
    """The third party failed in a way that may pass: worth another try."""


def subscribe(email: str) -> None:
    """Put `email` on the list.

    Raises TemporaryError where trying again may help (no connection, time-out, 429, 5xx), and
    httpx.HTTPStatusError where it cannot.
    """
    try:
        response = httpx.post(
            f"{get_config().mailing_list_url}/members", json={"email": email}, timeout=TIMEOUT
        )
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429 or error.response.is_server_error:
            raise TemporaryError(
                f"the mailing list answered {error.response.status_code}"
            ) from None
        raise
    except httpx.TransportError as error:
        raise TemporaryError(f"the mailing list does not answer: {type(error).__name__}") from error
