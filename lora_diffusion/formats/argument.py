"""An adapter file and its strength as people type them: `ink.safetensors:0.8`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from lora_diffusion.errors import UserError


def parse_adapters(texts: Iterable[str]) -> dict[Path, float]:
    """Files and strengths. A file given twice has its strengths added, as two copies of the adapter would be."""
    strengths: dict[Path, float] = {}
    for path, strength in map(parse_adapter, texts):
        strengths[path] = strengths.get(path, 0.0) + strength
    return strengths


def parse_adapter(text: str, option: str = "--adapter") -> tuple[Path, float]:
    """`ink.safetensors:0.8` or `ink.safetensors`, whose strength is 1; negative ones are fine.

    option: what errors say the text came from. Raises UserError on a strength that is none.
    """
    file, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists() or strength.endswith(".safetensors"):
        return Path(text), 1.0  # a colon may also be part of the path, as in C:\ink.safetensors
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not file or not math.isfinite(value):
        raise UserError(f"{option} {text}: {strength!r} is not a strength. Write FILE or FILE:0.8.")
    return Path(file), value
