"""The pictures that were drawn, with the settings they carry."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lora_diffusion.errors import UserError
from lora_diffusion.generation.infotext import Parameters, read_parameters
from webui.services.places import Places

SHOWN = 60


@dataclass(frozen=True)
class Picture:
    """id: of Places. parameters: None where the file carries none. text: they as they are written."""

    id: str
    name: str
    width: int
    height: int
    text: str
    parameters: Parameters | None


@dataclass
class Gallery:
    """Reads each file once."""

    places: Places
    _known: dict[str, tuple[int, Picture | None]] = field(default_factory=dict[str, tuple[int, Picture | None]])

    @property
    def folder(self) -> Path:
        return self.places.workspace.pictures

    def newest(self, limit: int = SHOWN) -> list[Picture]:
        """The newest first, by name: names begin with the time."""
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".png") and entry.is_file()]
        except OSError:
            return []
        chosen = heapq.nlargest(limit, names)
        return [picture for name in chosen if (picture := self._read(self.folder / name))]

    def find(self, id: str) -> Picture | None:
        """A picture of the folder; None for any other file."""
        path = self.path_of(id)
        return self._read(path) if path else None

    def path_of(self, id: str) -> Path | None:
        try:
            path = self.places.resolve(id)
        except UserError:
            return None
        return path if path.is_file() and path.suffix == ".png" and path.is_relative_to(self.folder.resolve()) else None

    def _read(self, path: Path) -> Picture | None:
        id = self.places.id_of(path)
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return None
        known = self._known.get(id)
        if known is None or known[0] != changed:
            known = (changed, _read_picture(id, path))
            self._known[id] = known
        return known[1]


def _read_picture(id: str, path: Path) -> Picture | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            text = image.info.get("parameters", "")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Picture(id, path.name, width, height, text if isinstance(text, str) else "", _parameters(text))


def _parameters(text: object) -> Parameters | None:
    try:
        return read_parameters(text) if isinstance(text, str) and text else None
    except UserError:  # written by hand, or by another program
        return None
