"""Files of a run that a browser may save: what lies directly in a run folder for people to take."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.errors import UserError
from webui.services.places import Places

SUFFIXES = frozenset({".safetensors", ".toml", ".md", ".png", ".txt", ".jsonl"})


class NoDownloadError(UserError):
    """There is no such file, or it is not one to take."""


def find_download(places: Places, id: str) -> Path:
    """The file that `id` names. Raises UserError."""
    path = places.resolve(id)
    if path.suffix not in SUFFIXES or not path.is_file() or not (path.parent / "state.json").is_file():
        raise NoDownloadError("There is no such file.")
    return path
