"""Settings from a PNG that somebody dropped on the page: any file at all."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.generation.infotext import Parameters, ParametersError, read_png

MAX_BYTES = 20_000_000
PNG_START = b"\x89PNG\r\n\x1a\n"


def read_settings(path: Path) -> Parameters:
    """Raises ParametersError for anything that is no PNG with settings."""
    with path.open("rb") as file:
        is_png = file.read(8) == PNG_START
    if not is_png or path.stat().st_size > MAX_BYTES:
        raise ParametersError("This is no PNG of a size that is read.")
    return read_png(path)
