"""A quick look at a folder of pictures, as the trainer reads it: enough to see that it is the right one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.captions import CaptionError, read_caption
from lora_diffusion.data.listing import CAPTION_SUFFIXES, METADATA_NAME, find_files, is_image_name
from lora_diffusion.errors import UserError
from webui.services.places import MAX_FILES, Places

SHOWN = 8


@dataclass(frozen=True)
class Glance:
    """Subfolders count. pictures: (id, caption) of the first ones."""

    num_images: int
    num_captioned: int
    pictures: tuple[tuple[str, str], ...]


def glance(places: Places, text: str) -> Glance | None:
    """None where there is no such folder that may be looked into."""
    if not text.strip():
        return None
    try:
        folder = places.resolve(text.strip())
        files = list(find_files(folder, MAX_FILES))
    except (OSError, UserError):
        return None
    images = sorted(filter(is_image_name, files), key=os.fspath)
    captions = {
        _stem(path): path
        for suffix in reversed(CAPTION_SUFFIXES)  # the first of them wins
        for path in files
        if path.name.lower().endswith(suffix)
    }
    has_table = any(path.name == METADATA_NAME for path in files)
    num_captioned = len(images) if has_table else sum(_stem(image) in captions for image in images)
    shown = tuple((places.id_of(image), _caption(captions.get(_stem(image)))) for image in images[:SHOWN])
    return Glance(len(images), num_captioned, shown)


def _stem(path: Path) -> str:
    return os.path.splitext(path)[0]


def _caption(file: Path | None) -> str:
    try:
        return read_caption(file)[:300] if file else ""
    except (OSError, CaptionError):
        return ""
