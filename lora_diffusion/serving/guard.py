"""What every request must be before anything else looks at it: for this host, from our pages, small, authorised."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ANY = ("0.0.0.0", "::", "[::]")


class Guard:
    """ASGI middleware. A page of another site cannot reach the server, not even by a name that it points here."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], token: str | None) -> None:
        """hosts: what the Host header may name. token: what `Authorization: Bearer` must carry, None for nothing."""
        self._app = app
        self._hosts = {*LOOPBACK, *(host.lower() for host in hosts)}
        self._is_any = any(host in _ANY for host in hosts)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_ours(host):
            return await _refuse(send, 400, f"This server does not answer for the host {host[:100]!r}.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return await _refuse(send, 403, "Requests from pages of other sites are refused.")
        if self._token is not None and not has_token(headers.get("authorization", ""), self._token):
            return await _refuse(send, 401, "A token is needed: send it as `Authorization: Bearer …`.")
        body = await _read_body(headers.get("content-length", ""), receive)
        if body is None:
            return await _refuse(send, 413, f"The request has more than {MAX_BODY_BYTES} bytes.")
        await self._app(scope, _replay(body, receive), send)

    def _is_ours(self, host: str) -> bool:
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        if name in self._hosts:
            return True
        if not self._is_any:
            return False
        try:  # open to all addresses: an address is fine, a name could be anyone's
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def has_token(authorization: str, token: str) -> bool:
    """Whether the header carries this token; takes the same time whatever it carries."""
    kind, _, given = authorization.partition(" ")
    return kind.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), token.encode())


async def _read_body(length: str, receive: Receive) -> bytes | None:
    """The whole body; None if it is too large, whatever its header claims."""
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    parts = [body]

    async def replay() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
