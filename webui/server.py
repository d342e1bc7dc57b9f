"""The web server: Gradio's pages, our pictures and our static files, behind one guard.

Nothing of the disk is served by path: Gradio gets no folder to serve, and pictures are drawn anew by id.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ["GRADIO_MCP_SERVER"] = "False"

import anyio.to_thread
import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from gradio.themes import Base

from lora_diffusion.errors import UserError
from webui.app import build
from webui.files import add_file_routes
from webui.guard import App, Guard, Limits, Message, Receive, Send
from webui.login import Login, add_login_routes
from webui.services.downloads import find_download
from webui.services.site import Site
from webui.translate import LANGUAGES

STATIC = Path(__file__).parent / "static"
TYPES = {
    "style.css": "text/css",
    "studio.css": "text/css",
    "dataset.css": "text/css",
    "captioning.css": "text/css",
    "app.js": "text/javascript",
    "dataset.js": "text/javascript",
    "captioning.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
MAX_UPLOAD_BYTES = 20_000_000


def make_app(
    site: Site, hosts: tuple[str, ...] = (), *, any_address: bool = False, login: Login | None = None
) -> FastAPI:
    """hosts, any_address: by what the server may be called besides this machine's own names, as of Guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/static-ui/{name}")
    def static(name: str) -> Response:
        if name not in TYPES:
            return PlainTextResponse("There is no such file.", 404)
        return Response(
            (STATIC / name).read_bytes(), media_type=TYPES[name], headers={"Cache-Control": "max-age=31536000"}
        )

    add_file_routes(app, site)

    @app.get("/picture/{kind}/{id:path}")
    async def picture(kind: str, id: str, request: Request, w: int = 2048, v: str = "") -> Response:
        """v: the file's version; whoever names it need never ask again."""
        try:
            data = await anyio.to_thread.run_sync(site.pictures.thumbnail, kind, id, w)
        except (UserError, OSError):
            return PlainTextResponse("There is no such picture.", 404)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": f"private, {'max-age=31536000, immutable' if v else 'no-cache'}"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/webp", headers=headers)

    @app.get("/download/{id:path}")
    def download(id: str) -> Response:
        try:
            path = find_download(site.places, id)
        except (UserError, OSError):
            return PlainTextResponse("There is no such file.", 404)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream")

    if login:
        add_login_routes(app, login, _head())
    for language in sorted(LANGUAGES, key=lambda language: language == "en"):  # "/" last: it takes what is left
        gr.mount_gradio_app(
            app,
            build(site, language),
            "/" if language == "en" else f"/{language}",
            theme=Base(font=["Inter", "Segoe UI", "Arial", "sans-serif"], font_mono=["monospace"]),
            head=_head(),
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            allowed_paths=[],
            max_file_size=MAX_UPLOAD_BYTES,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
        )
    app.add_middleware(PreferredLanguage)
    app.add_middleware(
        Guard,  # pyright: ignore[reportArgumentType]
        limits=Limits(MAX_UPLOAD_BYTES),
        hosts=hosts,
        any_address=any_address,
        login=login,
    )
    return app


@dataclass
class PreferredLanguage:
    """ASGI middleware: who opens "/" and reads German gets the German pages, until a cookie says otherwise."""

    app: App

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/" and scope["method"] == "GET":
            request = Request(scope)
            chosen = request.cookies.get("language")
            prefers = request.headers.get("accept-language", "")[:2] if chosen is None else chosen
            if prefers in LANGUAGES and prefers != "en":
                query = f"?{request.url.query}" if request.url.query else ""
                await RedirectResponse(f"/{prefers}/{query}", 307)(scope, receive, send)  # pyright: ignore
                return
        await self.app(scope, receive, send)


@cache
def _head() -> str:
    """Our files, with a version in the address so that a browser asks anew when they change."""
    version = hashlib.sha256(b"".join((STATIC / name).read_bytes() for name in sorted(TYPES))).hexdigest()[:12]
    return (
        f'<link rel="stylesheet" href="/static-ui/style.css?{version}">'
        f'<link rel="stylesheet" href="/static-ui/studio.css?{version}">'
        f'<link rel="icon" href="/static-ui/icon.svg?{version}" type="image/svg+xml">'
        f'<script src="/static-ui/app.js?{version}"></script>'
        f'<link rel="stylesheet" href="/static-ui/dataset.css?{version}">'
        f'<script src="/static-ui/dataset.js?{version}"></script>'
        f'<link rel="stylesheet" href="/static-ui/captioning.css?{version}">'
        f'<script src="/static-ui/captioning.js?{version}"></script>'
    )
