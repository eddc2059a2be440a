"""Which pages may make a browser speak to us in its user's name."""

from collections.abc import Collection

from fastapi import status
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from celeriac.web.origins import REFUSED, SAFE_METHODS, same_origin


class SameOriginMiddleware:
    """Refuse (403) what a page of another site makes a browser send in its user's name.

    A state-changing request, or a WebSocket, that carries an Origin must carry our own, or one of
    `origins` (`https://host[:port]`). A client that sends none, such as curl, is no browser.
    WebSockets whose paths begin with one of `except_sockets` are left to routes that look for
    themselves, as those of `status_router` do, which let in who has a token instead.
    """

    def __init__(
        self, app: ASGIApp, origins: Collection[str] = (), except_sockets: Collection[str] = ()
    ) -> None:
        self._app, self._origins = app, frozenset(origins)
        self._except = tuple(except_sockets)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            if not same_origin(Headers(scope=scope), self._origins):
                response = JSONResponse({"detail": REFUSED}, 403)
                await response(scope, receive, send)
                return
        elif scope["type"] == "websocket" and not self._lets_in(scope):
            # Closing before accepting is how ASGI refuses a handshake: the client sees 403.
            await send({"type": "websocket.close", "code": status.WS_1008_POLICY_VIOLATION})
            return
        await self._app(scope, receive, send)

    def _lets_in(self, scope: Scope) -> bool:
        left = scope["path"].startswith(self._except)
        return left or same_origin(Headers(scope=scope), self._origins)
