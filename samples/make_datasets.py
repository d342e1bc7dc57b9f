"""Draw the sample data sets `samples/neon` and `samples/ink`: the same 32 scenes in two styles, with captions.

    python -m samples.make_datasets

Also draws them all, and the same scenes in the base's flat style, into `samples/images/datasets.png`.
"""

from __future__ import annotations

from pathlib import Path

from samples.captions import STYLE_WORDS
from samples.grids import grid
from samples.prompts import dataset_scenes, style_caption
from samples.styles import STYLES

SAMPLES = Path(__file__).parent
PICTURE_PX = 64
SHEET_STYLES = ("flat", *STYLE_WORDS)


def write_dataset(style: str, folder: Path) -> None:
    """One PNG and one caption file of the same name for each scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(dataset_scenes(), start=1):
        name = f"{i:02d}-{'-'.join(thing.kind for thing in scene.things)}"
        STYLES[style](scene, PICTURE_PX).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(style_caption(scene, style) + "\n", encoding="utf-8")


def main() -> None:
    for style in STYLE_WORDS:
        write_dataset(style, SAMPLES / style)
        print(f"wrote {SAMPLES.name}/{style}")
    sheet = [STYLES[style](scene, PICTURE_PX) for style in SHEET_STYLES for scene in dataset_scenes()]
    images = SAMPLES / "images"
    images.mkdir(exist_ok=True)
    grid(sheet, columns=16, zoom=1).save(images / "datasets.png", optimize=True)


if __name__ == "__main__":
    main()
