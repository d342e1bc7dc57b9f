"""What every request passes before anything looks at it: who asks, from where, for what, and how much of it.

A web page of somebody else can make a browser send requests to this machine. Host names stop DNS rebinding, origins
stop forged requests, and only the addresses that the pages use exist.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from webui.login import Login

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})

ADDRESSES = re.compile(
    r"(?:/(?:de|en))?/(?:"
    r"(?:[a-z-]+/?)?"  # pages
    r"|(?:static|assets|svelte)/.*|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(?:/\d+)?|config/?"
    r"|gradio_api/(?:info|config|theme\.css|app_id|upload|upload_progress|cancel|reset|startup-events|login_check)/?"
    r"|gradio_api/(?:heartbeat|queue|run|call|api)/.*|gradio_api/file=.*|gradio_api/component_server/?"
    r")"
    r"|/(?:picture|download|static-ui)/.*|/healthz|/log(?:in|out)"
)
"""Gradio has more: proxies to other servers, editing the app from the browser, recordings. Nobody needs them here."""

PUBLIC = re.compile(r"/login|/healthz|/static-ui/[a-z.]+")

SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), microphone=(), geolocation=()",
    # Gradio compiles its templates in the browser, which takes inline scripts and eval.
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; "
        b"connect-src 'self' blob: data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        b"form-action 'self'; frame-src 'none'; frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True)
class Limits:
    """upload_bytes, files: of one request. requests: with a body of files, per minute and server."""

    upload_bytes: int
    files: int = 200
    requests: int = 600


class _TooMuch(Exception):
    """A body beyond the limits."""


@dataclass
class Guard:
    """ASGI middleware.

    hosts: names the server may be called by, besides this machine's own. any_address: also any IP address, for a
    server that others reach; a name that was rebound to this machine is never one.
    """

    app: App
    limits: Limits
    hosts: tuple[str, ...] = ()
    any_address: bool = False
    login: Login | None = None
    _uploads: deque[float] = field(default_factory=deque[float], init=False)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks websocket
        send = _with_headers(send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            await _answer(send, *refusal)
            return
        if self.login and not PUBLIC.fullmatch(scope["path"]) and not self.login.knows(headers.get(b"cookie", "")):
            if scope["method"] == "GET" and "text/html" in headers.get(b"accept", ""):
                await _answer(send, 303, "Log in first.", {b"location": b"/login"})
            else:
                await _answer(send, 401, "Log in first.")
            return
        await self._limited(scope, receive, send, headers)

    def _refusal(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if not self._is_ours(host):
            return 400, "This server is not called by that name. Start it with --name to allow one."
        if not _is_ours_or_a_link(scope["method"], headers, host):
            return 403, "The request comes from another web site."
        if not ADDRESSES.fullmatch(scope["path"]):
            return 404, "There is no such address."
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.upload_bytes:
            return 413, f"A request may have at most {self.limits.upload_bytes:,} bytes."
        if "multipart" in headers.get(b"content-type", "") and self._is_too_often():
            return 429, "Too many uploads in a minute."
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name in LOCAL or name in self.hosts:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name == socket.gethostname()
        return True

    def _is_too_often(self) -> bool:
        now = monotonic()
        while self._uploads and self._uploads[0] < now - 60:
            self._uploads.popleft()
        self._uploads.append(now)
        return len(self._uploads) > self.limits.requests

    async def _limited(self, scope: Message, receive: Receive, send: Send, headers: dict[bytes, str]) -> None:
        """Pass the request on; a body that is longer than it said, or holds too many files, is cut off and refused."""
        is_form = "multipart" in headers.get(b"content-type", "")
        num_bytes, num_files, is_refused = 0, 0, False

        async def receiving() -> Message:
            nonlocal num_bytes, num_files
            message = await receive()
            body = message.get("body", b"")
            num_bytes += len(body)
            num_files += body.count(b"filename=") if is_form else 0
            if num_bytes > self.limits.upload_bytes or num_files > self.limits.files:
                raise _TooMuch
            return message

        async def sending(message: Message) -> None:
            nonlocal is_refused
            is_over = num_bytes > self.limits.upload_bytes or num_files > self.limits.files
            if is_over and not is_refused and message["type"] == "http.response.start":
                is_refused = True
                await _answer(send, 413, "The request has more bytes or files than it may have.")
            elif not is_refused:
                await send(message)

        try:
            await self.app(scope, receiving, sending)
        except _TooMuch:
            if not is_refused:
                await _answer(send, 413, "The request has more bytes or files than it may have.")


def _is_ours_or_a_link(method: str, headers: dict[bytes, str], host: str) -> bool:
    """Browsers say where a request comes from; a program that is no browser need not.

    A page of somebody else may hold a link to us that is clicked, and no more: no form, no picture, no request.
    """
    origin = headers.get(b"origin")
    if origin is not None and (origin == "null" or urlsplit(origin).netloc != host):
        return False
    if headers.get(b"sec-fetch-site", "same-origin") in ("same-origin", "none"):
        return True
    return method not in UNSAFE and headers.get(b"sec-fetch-mode") == "navigate"


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in SECURITY_HEADERS]
            message["headers"] = [*kept, *SECURITY_HEADERS.items()]
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str, headers: dict[bytes, bytes] | None = None) -> None:
    lines = {b"content-type": b"text/plain; charset=utf-8", **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": list(lines.items())})
    await send({"type": "http.response.body", "body": text.encode()})
