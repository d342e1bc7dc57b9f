"""A folder of pictures with captions, as each of the trainers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def write_pictures(folder: Path, count: int, size: int) -> Path:
    """`count` smooth random PNGs of `size` px with a .txt each and one metadata.jsonl; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines: list[str] = []
    for number in range(count):
        path = folder / f"{number:05d}.png"
        caption = f"a {COLOURS[number % 6]} picture of shape {number}"
        lines.append(json.dumps({"file_name": path.name, "text": caption}))
        if not path.exists():
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)
            path.with_suffix(".txt").write_text(caption)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
