"""What stands before the application: the bearer token and the largest body. Pure ASGI: streams pass untouched."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 * 2**20
_OPEN_PATH = "/v1/health"


class Gate:
    """ASGI middleware: asks for the bearer token on every path but /v1/health, and stops bodies over MAX_BODY_BYTES."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 or 413."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._allowed(scope["path"], headers.get(b"authorization", b"")):
            message = "this server asks for its token: send 'Authorization: Bearer TOKEN'"
            refusal = JSONResponse(
                {"detail": [{"loc": ["header", "authorization"], "msg": message}]}, 401, {"WWW-Authenticate": "Bearer"}
            )
            return await refusal(scope, receive, send)
        return await self._app(scope, _bounded(receive), send)

    def _allowed(self, path: str, given: bytes) -> bool:
        return self._expected is None or path == _OPEN_PATH or hmac.compare_digest(given, self._expected)


def _bounded(receive: Receive) -> Receive:
    """`receive` that raises HTTP 413 once a body has grown past MAX_BODY_BYTES."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, [{"loc": ["body"], "msg": f"the body is larger than {MAX_BODY_BYTES} bytes"}])
        return message

    return bounded
