"""Which pages may make a browser speak to us in its user's name."""

from collections.abc import Collection
from typing import Protocol
from urllib.parse import urlsplit

SAFE_METHODS = {"GET", "HEAD", "OPTIONS", "TRACE"}
REFUSED = "this request comes from another site"


class Headers(Protocol):
    """Of a request, by their names in whatever case."""

    def get(self, key: str, /) -> str | None: ...


def same_origin(headers: Headers, origins: Collection[str] = ()) -> bool:
    """Whether the request may be our own page's. The scheme is not compared: a proxy ends TLS."""
    origin = headers.get("origin")
    if origin is None:
        site = headers.get("sec-fetch-site") or ""
        return site.lower() not in ("cross-site", "same-site")
    if origin in origins:
        return True
    ours, theirs = _authority(f"http://{headers.get('host') or ''}"), _authority(origin)
    return theirs is not None and ours == theirs


def _authority(origin: str) -> tuple[str, int | None] | None:
    """Host and port, None for a scheme's own; None for what no page of ours can have."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.hostname, None if port in (80, 443) else port
