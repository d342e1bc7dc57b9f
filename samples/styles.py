"""Styles: functions that turn a `Scene` into a picture of any size.

`flat` is the world the base model knows. `neon` and `ink` are the styles of the sample data sets. `mosaic` and
`halftone` only widen what the autoencoder has seen. Sizes of lines and patterns are fractions of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from samples.drawing import CREAM, PALETTE, Point, Rgb, Scene, background_parts, mix, scene_parts

OVERSAMPLING = 4
NIGHT_BLUE: Rgb = (16, 12, 44)
PAPER: Rgb = (247, 239, 219)
INK: Rgb = (24, 20, 28)
HATCH_PERIOD = 1 / 8  # along x and along y; 8 pixels of 64, so a line and a gap fill two latent cells of the f4 VAE
HATCH_SHARE = 0.42
INK_LINE = 1 / 32
NEON_LINE = 1 / 32
NEON_GLOW = 1 / 22
MOSAIC_TILES = 16
HALFTONE_CELLS = 12

NEON_COLOURS: dict[str, Rgb] = {
    "brown": (255, 150, 60),
    "black": (110, 120, 255),
    "gray": (170, 190, 220),
    "green": (50, 255, 110),
    "blue": (60, 130, 255),
    "red": (255, 50, 60),
    "purple": (190, 70, 255),
}
"""Glowing stand-ins for the palette colours that are too dark to glow."""


def flat(scene: Scene, size: int) -> Image.Image:
    """Plain filled areas."""
    backdrop, scenery = background_parts(scene.background)
    canvas = Image.new("RGB", _oversampled(size), backdrop)
    draw = ImageDraw.Draw(canvas)
    for part in (*scenery, *scene_parts(scene)):
        draw.polygon(_pixels(part.points, canvas.width), fill=part.fill)
    return canvas.reduce(OVERSAMPLING)


def neon(scene: Scene, size: int) -> Image.Image:
    """Glowing outlines in the things' colours on a night-blue ground, whatever the background was."""
    canvas = Image.new("RGB", _oversampled(size), NIGHT_BLUE)
    tubes = Image.new("RGB", canvas.size)
    fill, line = ImageDraw.Draw(canvas), ImageDraw.Draw(tubes)
    width = round(canvas.width * NEON_LINE)
    for part in (*background_parts(scene.background)[1], *scene_parts(scene)):
        glow = _glowing(part.fill)
        pixels = _pixels(part.points, canvas.width)
        fill.polygon(pixels, fill=mix(NIGHT_BLUE, glow, 0.0 if part.tone == "light" else 0.16))
        line.polygon(pixels, fill=(0, 0, 0))
        _outline(line, pixels, glow, width)
    tubes = tubes.reduce(OVERSAMPLING)
    halo = tubes.filter(ImageFilter.GaussianBlur(size * NEON_GLOW))
    light = np.asarray(canvas.reduce(OVERSAMPLING), np.float32) + 0.75 * np.asarray(halo, np.float32)
    bright = np.asarray(tubes, np.float32)
    return Image.fromarray(np.clip(np.maximum(light, bright), 0, 255).astype(np.uint8))


def ink(scene: Scene, size: int) -> Image.Image:
    """Black outlines and diagonal hatching on cream paper; no colour is left, the paper around the things is bare."""
    canvas = Image.new("RGB", _oversampled(size), PAPER)
    hatching = _hatching(canvas.width)
    draw = ImageDraw.Draw(canvas)
    width = round(canvas.width * INK_LINE)
    for part in (*background_parts(scene.background)[1], *scene_parts(scene)):
        pixels = _pixels(part.points, canvas.width)
        if part.tone == "body":
            mask = Image.new("1", canvas.size)
            ImageDraw.Draw(mask).polygon(pixels, fill=1)
            canvas.paste(hatching, mask=mask)
        else:
            draw.polygon(pixels, fill=PAPER if part.tone == "light" else INK)
        _outline(draw, pixels, INK, width)
    return canvas.reduce(OVERSAMPLING)


def mosaic(scene: Scene, size: int) -> Image.Image:
    """Square tiles with dark joints."""
    tiles = np.asarray(flat(scene, MOSAIC_TILES))
    canvas = Image.fromarray(tiles).resize(_oversampled(size), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for i in range(MOSAIC_TILES + 1):
        at = i * canvas.width // MOSAIC_TILES
        draw.line([(at, 0), (at, canvas.width)], fill=(50, 46, 56), width=canvas.width // 80)
        draw.line([(0, at), (canvas.width, at)], fill=(50, 46, 56), width=canvas.width // 80)
    return canvas.reduce(OVERSAMPLING)


def halftone(scene: Scene, size: int) -> Image.Image:
    """Wine-red dots on cream, the larger the darker the picture is there."""
    darkness = 1 - np.asarray(flat(scene, HALFTONE_CELLS).convert("L"), np.float32) / 255
    canvas = Image.new("RGB", _oversampled(size), CREAM)
    draw = ImageDraw.Draw(canvas)
    cell = canvas.width / HALFTONE_CELLS
    for (row, column), dark in np.ndenumerate(darkness):
        radius = 0.68 * cell * float(dark) ** 0.5
        x, y = (column + 0.5) * cell, (row + 0.5) * cell
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(122, 24, 48))
    return canvas.reduce(OVERSAMPLING)


STYLES: dict[str, Callable[[Scene, int], Image.Image]] = {
    "flat": flat,
    "neon": neon,
    "ink": ink,
    "mosaic": mosaic,
    "halftone": halftone,
}


def object_mask(scene: Scene, size: int) -> np.ndarray:
    """Boolean (size, size): the pixels of the first thing's parts that carry its palette colour."""
    colour = PALETTE[scene.things[0].colour]
    canvas = Image.new("L", _oversampled(size))
    draw = ImageDraw.Draw(canvas)
    for part in scene_parts(Scene(scene.things[:1], scene.background)):
        draw.polygon(_pixels(part.points, canvas.width), fill=255 if part.fill == colour else 0)
    return np.asarray(canvas.reduce(OVERSAMPLING)) > 200


def _oversampled(size: int) -> tuple[int, int]:
    return size * OVERSAMPLING, size * OVERSAMPLING


def _pixels(points: Sequence[Point], width: int) -> list[Point]:
    return [(x * width, y * width) for x, y in points]


def _outline(draw: ImageDraw.ImageDraw, pixels: list[Point], colour: Rgb, width: int) -> None:
    """A closed line with rounded corners."""
    draw.line([*pixels, pixels[0], pixels[1]], fill=colour, width=width, joint="curve")


def _glowing(fill: Rgb) -> Rgb:
    """The neon tube's colour for a fill: its own if bright, else a brighter one of the same hue."""
    name = min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(PALETTE[name], fill, strict=True)))
    return NEON_COLOURS.get(name, PALETTE[name])


def _hatching(width: int) -> Image.Image:
    ramp = np.arange(width) / (width * HATCH_PERIOD)
    stripes = (ramp[:, None] + ramp[None, :]) % 1 < HATCH_SHARE
    return Image.fromarray(np.where(stripes[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8)))
