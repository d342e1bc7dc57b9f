"""Judges a 64 x 64 picture: which object it shows, in which style, in which colours.

The network was trained on drawn pictures only (`train_judge.py`), never on generated ones. Colours need no network:
they are read off the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from samples.drawing import KINDS, PALETTE, Scene, Thing
from samples.prompts import Prompt
from samples.styles import object_mask

WEIGHTS = Path(__file__).parent / "judge.safetensors"
PICTURE_PX = 64
STYLE_LABELS = ("flat", "neon", "ink", "other")
BORDER_PX = 3
MIN_CONTRAST = 48.0  # distance in RGB from the background at which a pixel counts as a part of the object
LARGEST_SHIFT_PX = 6

Scores = dict[str, list[str] | list[bool]]


class JudgeNetwork(nn.Module):
    """A small convolutional network with one head for the kind of object and one for the style."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.kind = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1] * 16, len(KINDS)))
        self.style = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(STYLE_LABELS)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures: (B, 3, 64, 64) in [0, 1]. Returns the logits of kind and style."""
        features = self.features(2 * pictures - 1)  # (B, 128, 4, 4)
        return self.kind(features), self.style(features)


class Judge:
    """Scores pictures against what was asked for."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        network = JudgeNetwork()
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return cls(network)

    @torch.no_grad()
    def labels(self, images: Sequence[Image.Image]) -> tuple[list[str], list[str]]:
        """The kind and the style of each picture."""
        pixels = torch.from_numpy(np.stack([_pixels(image) for image in images])).permute(0, 3, 1, 2) / 255
        kinds, styles = self.network(pixels)
        return [KINDS[i] for i in kinds.argmax(1)], [STYLE_LABELS[i] for i in styles.argmax(1)]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], style: str = "flat") -> Scores:
        """One entry per picture in each list.

        Labels: "kind", "style", "colour", "background". Verdicts: "kind_right", "style_right", "colour_right",
        "background_right". Colours mean something in the flat style only; a background that was not asked for is right.
        """
        kinds, styles = self.labels(images)
        pixels = [_pixels(image) for image in images]
        colours = [object_colour(picture, prompt.kind) for picture, prompt in zip(pixels, prompts, strict=True)]
        backgrounds = [background_colour(picture) for picture in pixels]
        return {
            "kind": kinds,
            "style": styles,
            "colour": colours,
            "background": backgrounds,
            "kind_right": [kind == prompt.kind for kind, prompt in zip(kinds, prompts, strict=True)],
            "style_right": [found == style for found in styles],
            "colour_right": [colour == prompt.colour for colour, prompt in zip(colours, prompts, strict=True)],
            "background_right": [
                prompt.background in (None, found) for found, prompt in zip(backgrounds, prompts, strict=True)
            ],
        }


def background_colour(pixels: np.ndarray) -> str:
    """The palette colour nearest to the median of the border. pixels: uint8 (64, 64, 3)."""
    return _nearest(_border_median(pixels)[None])[0]


def object_colour(pixels: np.ndarray, kind: str) -> str:
    """The palette colour that most pixels of the object's main areas are nearest to.

    The main areas are those of a drawn object of this kind, moved to where most of it differs from the background.
    """
    foreground = np.linalg.norm(pixels.astype(np.float32) - _border_median(pixels), axis=2) > MIN_CONTRAST
    mask = object_mask(Scene((Thing(kind, "black"),), "white"), PICTURE_PX)
    steps = range(-LARGEST_SHIFT_PX, LARGEST_SHIFT_PX + 1, 2)
    shifted = [np.roll(mask, (dy, dx), axis=(0, 1)) for dy in steps for dx in steps]
    best = max(shifted, key=lambda candidate: int((candidate & foreground).sum()))
    chosen = pixels[best & foreground]
    if len(chosen) == 0:
        return background_colour(pixels)
    names, counts = np.unique(_nearest(chosen.astype(np.float32)), return_counts=True)
    return str(names[counts.argmax()])


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 (64, 64, 3)."""
    return np.asarray(image.convert("RGB").resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX))


def _border_median(pixels: np.ndarray) -> np.ndarray:
    inside = np.zeros(pixels.shape[:2], bool)
    inside[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    return np.median(pixels[~inside].astype(np.float32), axis=0)


def _nearest(colours: np.ndarray) -> list[str]:
    """The palette's names for colours (N, 3)."""
    names = list(PALETTE)
    palette = np.array(list(PALETTE.values()), np.float32)
    distances = np.linalg.norm(colours[:, None] - palette[None], axis=2)
    return [names[i] for i in distances.argmin(axis=1)]
