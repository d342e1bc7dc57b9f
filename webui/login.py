"""One user with a password, a session in a cookie. Every address asks for it, pictures included."""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from webui.components.html import html
from webui.translate import Translator

COOKIE = "lora-diffusion-session"
SESSION_S = 30 * 24 * 3600
TRIES, PER_S = 10, 60.0
MAX_BODY_BYTES = 10_000


@dataclass
class Login:
    """Sessions are kept in memory: a restart of the server asks everyone again."""

    user: str
    password: str
    _sessions: dict[str, float] = field(default_factory=dict[str, float], init=False)
    _failures: list[float] = field(default_factory=list[float], init=False)

    def knows(self, cookies: str) -> bool:
        """Whether the request's cookies hold a session that lasts."""
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and self._sessions.get(found.value, 0.0) > time.time()

    def open(self, user: str, password: str) -> str | None:
        """A new session's token; None if the name or the password is wrong, or after too many wrong ones."""
        now = time.time()
        self._failures = [failed for failed in self._failures if failed > now - PER_S]
        right_user = hmac.compare_digest(user.encode(), self.user.encode())
        right_password = hmac.compare_digest(password.encode(), self.password.encode())
        if len(self._failures) >= TRIES or not (right_user and right_password):
            self._failures.append(now)
            return None
        token = secrets.token_urlsafe(32)
        self._sessions = {old: until for old, until in self._sessions.items() if until > now} | {token: now + SESSION_S}
        return token

    def close(self, cookies: str) -> None:
        """End the session of these cookies."""
        found = SimpleCookie(cookies).get(COOKIE)
        if found is not None:
            self._sessions.pop(found.value, None)


def add_login_routes(app: FastAPI, login: Login, head: str) -> None:
    """`/login` and `/logout`. head: what the pages have in their head."""

    @app.get("/login")
    def show(request: Request) -> Response:
        return HTMLResponse(_page(_translator(request), head))

    @app.post("/login")
    async def enter(request: Request) -> Response:
        body = await request.body()
        sent = parse_qs(body[:MAX_BODY_BYTES].decode("utf-8", "replace"))
        token = login.open(sent.get("username", [""])[0], sent.get("password", [""])[0])
        if token is None:
            return HTMLResponse(_page(_translator(request), head, failed=True), 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, token, max_age=SESSION_S, httponly=True, samesite="strict")
        return response

    @app.get("/logout")
    def leave(request: Request) -> Response:
        login.close(request.headers.get("cookie", ""))
        return RedirectResponse("/login", 303)


def _translator(request: Request) -> Translator:
    return Translator("de" if request.headers.get("accept-language", "").startswith("de") else "en")


def _page(t: Translator, head: str, *, failed: bool = False) -> str:
    return '<!doctype html><html lang="en"><head><meta charset="utf-8">' + str(
        html(
            '<meta name="viewport" content="width=device-width"><title>lora_diffusion</title>%HEAD%</head>'
            '<body><main class="login"><form method="post" action="/login" class="card form"><h1>lora_diffusion</h1>'
            '{wrong}<label for="login-user">{user}</label><input id="login-user" name="username" type="text" '
            'autocomplete="username" autofocus required><label for="login-password">{password}</label>'
            '<input id="login-password" name="password" type="password" autocomplete="current-password" required>'
            '<button class="go" id="login-enter">{enter}</button></form></main></body></html>',
            wrong=html('<p class="said bad">{text}</p>', text=t("login.wrong")) if failed else "",
            user=t("login.user"),
            password=t("login.password"),
            enter=t("login.enter"),
        )
    ).replace("%HEAD%", head)
