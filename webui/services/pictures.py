"""Pictures for the browser: only by id, only from the workspace, always drawn anew at the size that is shown.

What leaves the server is a WebP that we encoded, so a file that is something else than a picture goes nowhere.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_diffusion.data.images import FORMATS
from lora_diffusion.data.listing import IMAGE_SUFFIXES
from lora_diffusion.errors import UserError
from webui.services.places import Places

WIDTHS = (96, 160, 240, 320, 480, 640, 1024, 2048)
"""What `?w=` is rounded up to, so that the cache cannot be filled with a thumbnail per pixel."""

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 200_000_000

_PREVIEW = re.compile(r"(?:.+/)?previews/(?:now-)?\d{6,8}-\d{1,4}\.png")


class PictureError(UserError):
    """There is no such picture, or it cannot be shown."""


@dataclass(frozen=True)
class Pictures:
    """Thumbnails of the pictures in `places`, kept in `cache` for each version of a file."""

    places: Places
    cache: Path

    def thumbnail(self, kind: str, id: str, width: int) -> bytes:
        """The picture `id` at most `width` pixels wide, as WebP. Raises PictureError."""
        path = self._find(kind, id)
        width = next((step for step in WIDTHS if step >= width), WIDTHS[-1])
        cached = self.cache / f"{_version(path)}-{width}.webp"
        try:
            data = cached.read_bytes()
            if _is_whole(data):
                return data
        except OSError:
            pass
        data = _encode(path, width)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            _keep(cached, data)
        except OSError:
            pass  # a full disk must not hide the picture
        return data

    def _find(self, kind: str, id: str) -> Path:
        if kind not in ("preview", "dataset") or (kind == "preview" and not _PREVIEW.fullmatch(id)):
            raise PictureError("There is no such picture.")
        path = self.places.resolve(id)
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise PictureError("There is no such picture.")
        return path


def _version(path: Path) -> str:
    """Another one for another file or content, without reading it."""
    stat = path.stat()
    return hashlib.sha256(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}".encode()).hexdigest()[:32]


def _keep(path: Path, data: bytes) -> None:
    """Appears whole. It can be made again, so it does not wait for the disk, which takes longer than drawing it."""
    part = path.with_name(f".{path.stem}-{secrets.token_hex(4)}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_whole(data: bytes) -> bool:
    """After a power cut a thumbnail may have lost its end; a WebP says how long it is."""
    return data[:4] == b"RIFF" and len(data) == int.from_bytes(data[4:8], "little") + 8


def _encode(path: Path, width: int) -> bytes:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError("The picture is too large to be shown.")
            image.draft("RGB", (width, width))
            upright = ImageOps.exif_transpose(image).convert("RGBA" if "A" in image.getbands() else "RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise PictureError("The file is not a picture that can be read.") from None
    if upright.width > width:
        height = max(1, round(upright.height * width / upright.width))
        upright = upright.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    upright.save(buffer, "WEBP", quality=88, method=0)
    return buffer.getvalue()
