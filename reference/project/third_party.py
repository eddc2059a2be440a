"""The third party: a mailing list somewhere on the network, slow and at times broken."""

import httpx

from project.config import get_config

TIMEOUT = 10.0  # seconds


class ThirdPartyError(Exception):
    """The third party did not do what it was asked, and says so again if asked again."""


class TemporaryError(ThirdPartyError):
    """It failed in a way that may pass: worth another try."""


def subscribe(email: str) -> None:
    """Put `email` on the list.

    Raises TemporaryError where trying again may help (no connection, time-out, 429, 5xx), and
    ThirdPartyError where it cannot.
    """
    try:
        response = httpx.post(
            f"{get_config().mailing_list_url}/members", json={"email": email}, timeout=TIMEOUT
        )
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        kind = TemporaryError if status == 429 or status >= 500 else ThirdPartyError
        raise kind(f"the mailing list answered {status}") from None
    except httpx.TransportError as error:
        raise TemporaryError(f"the mailing list does not answer: {type(error).__name__}") from error
