"""Sheets of small pictures for the eye."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], columns: int, zoom: int) -> Image.Image:
    """Pictures side by side, each pixel `zoom` pixels wide, with thin gaps."""
    side, gap = images[0].width * zoom, 2
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for i, image in enumerate(images):
        place = (i % columns * (side + gap), i // columns * (side + gap))
        canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return canvas
