"""A picture for an adapter: the one in its file, one beside it, its run's newest preview, or one drawn with it."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_diffusion.container import read_header
from lora_diffusion.data.images import FORMATS
from lora_diffusion.errors import UserError
from webui.services.library import Adapter, picture_beside
from webui.services.pictures import MAX_PIXELS, PictureError
from webui.services.site import Site

SIDE_PX = 256
MAX_BYTES = 2_000_000


def thumbnail_of(site: Site, id: str, width: int) -> bytes:
    """The adapter's picture as WebP. Raises UserError where there is none."""
    adapter = site.studio.library.find(id)
    if adapter is None:
        raise PictureError("There is no such picture.")
    if adapter.facts.has_thumbnail:
        return _encode(_decode(read_header(adapter.path).metadata.get("modelspec.thumbnail", "")))
    beside = picture_of(site, adapter)
    if beside is None:
        raise PictureError("There is no such picture.")
    return site.pictures.thumbnail("dataset", site.places.id_of(beside), width)


def picture_of(site: Site, adapter: Adapter) -> Path | None:
    """A picture on disk that shows what the adapter does."""
    beside = picture_beside(adapter)
    if beside is not None:
        return beside
    for picture in site.studio.gallery.newest():
        names = picture.parameters.request.adapters if picture.parameters else {}
        if adapter.name in names and names[adapter.name] != 0 and "-grid-" not in picture.name:
            return site.studio.gallery.path_of(picture.id)
    return None


def data_uri(path: Path) -> str:
    """A picture as ModelSpec's `thumbnail`: a JPEG of at most 256 px in a data URI."""
    with Image.open(path, formats=FORMATS) as image:
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _decode(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or len(body) > MAX_BYTES:
        raise PictureError("The file's thumbnail cannot be read.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("The file's thumbnail cannot be read.") from None


def _encode(data: bytes) -> bytes:
    """Drawn anew: what the file says is a picture may be something else."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError("The picture is too large to be shown.")
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise PictureError("The file's thumbnail cannot be read.") from None
    small.thumbnail((512, 512))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=88)
    return file.getvalue()
