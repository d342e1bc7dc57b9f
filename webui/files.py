"""Files as they are on disk, by id: drawn pictures with their settings, adapters and their thumbnails."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from lora_diffusion.errors import UserError
from webui.services.site import Site
from webui.services.thumbnails import thumbnail_of


def add_file_routes(app: FastAPI, site: Site) -> None:
    """Below /picture/, which the guard lets pass. What is no file of ours is not there."""

    @app.get("/picture/original/{id:path}")
    async def original(id: str) -> Response:
        picture = await anyio.to_thread.run_sync(site.studio.gallery.find, id)
        path = site.studio.gallery.path_of(id) if picture else None
        return _attachment(path, "image/png")

    @app.get("/picture/adapter-file/{id:path}")
    async def adapter_file(id: str) -> Response:
        adapter = await anyio.to_thread.run_sync(site.studio.library.find, id)
        return _attachment(adapter.path if adapter else None, "application/octet-stream")

    @app.get("/picture/adapter/{id:path}")
    async def adapter(id: str, w: int = 320) -> Response:
        try:
            data = await anyio.to_thread.run_sync(thumbnail_of, site, id, w)
        except (UserError, OSError, ValueError):
            return PlainTextResponse("There is no such picture.", 404)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, no-cache"})


def _attachment(path: Path | None, media_type: str) -> Response:
    if path is None:
        return PlainTextResponse("There is no such file.", 404)
    return FileResponse(path, media_type=media_type, filename=path.name, content_disposition_type="attachment")
