"""A quick look at a folder of pictures: enough to see that it is the right one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.captions import CaptionError, read_caption
from lora_diffusion.errors import UserError
from webui.services.places import IMAGE_SUFFIXES, Places

MAX_FILES = 20_000
SHOWN = 8


@dataclass(frozen=True)
class Glance:
    """pictures: (id, caption) of the first ones."""

    num_images: int
    num_captioned: int
    pictures: tuple[tuple[str, str], ...]


def glance(places: Places, text: str) -> Glance | None:
    """None where there is no such folder that may be looked into."""
    if not text.strip():
        return None
    try:
        folder = places.resolve(text.strip())
        names = {entry.name for entry, _ in zip(folder.iterdir(), range(MAX_FILES), strict=False)}
    except (OSError, UserError):
        return None
    images = sorted(name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    captions = {name: _caption_file(name, names) for name in images}
    table = (folder / "metadata.jsonl").is_file() or (folder / "metadata.csv").is_file()
    shown = tuple((places.id_of(folder / name), _caption(folder, captions[name])) for name in images[:SHOWN])
    return Glance(len(images), len(images) if table else sum(map(bool, captions.values())), shown)


def _caption_file(image: str, names: set[str]) -> str:
    stem = Path(image).stem
    return next((name for suffix in (".txt", ".caption") if (name := stem + suffix) in names), "")


def _caption(folder: Path, name: str) -> str:
    try:
        return read_caption(folder / name)[:300] if name else ""
    except (OSError, CaptionError):
        return ""
