"""Pictures that look alike: resaved, resized or slightly edited copies that would be trained twice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_diffusion.data.captions import printable
from lora_diffusion.data.folder import Sample
from lora_diffusion.data.images import ImageError, open_image, quiet_pillow
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)

HASH_SIDE = 16
"""The hash has 16 x 16 bits, the signs of the lowest frequencies. With the usual 8 x 8, flat drawings of different
things collide."""

MAX_DISTANCE = 20
"""Bits of 256 that may differ. Unrelated pictures differ in about 128, resaved and resized ones in fewer than 20."""


def find_near_duplicates(samples: Sequence[Sample], track: Track = silent) -> list[tuple[Path, Path]]:
    """Pairs of pictures with different bytes that look the same, in the order of `samples`."""
    import imagehash  # takes a second, and only `check` needs it

    paths: list[Path] = []
    contents: list[str] = []
    hashes: list[torch.Tensor] = []
    with quiet_pillow():
        for sample in track(samples, "Comparing images"):
            try:
                image = open_image(sample.image)
            except ImageError as error:
                logger.warning("%s: %s", printable(str(sample.image)), error)
                continue
            bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
            hashes.append(torch.from_numpy(bits.flatten()).to(torch.float32) * 2 - 1)
            paths.append(sample.image)
            contents.append(sample.content)
    return [
        (paths[i], paths[j]) for i, j in _close_pairs(hashes) if contents[i] != contents[j] and paths[i] != paths[j]
    ]


def _close_pairs(hashes: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Index pairs i < j whose hashes, as vectors of +1 and -1, differ in at most MAX_DISTANCE places."""
    if not hashes:
        return []
    table = torch.stack(list(hashes))  # (pictures, bits)
    least = table.shape[1] - 2 * MAX_DISTANCE  # the scalar product at that distance
    pairs: list[tuple[int, int]] = []
    for i in range(len(table) - 1):
        close = (table[i + 1 :] @ table[i] >= least).nonzero().flatten()
        pairs += [(i, i + 1 + int(j)) for j in close]
    return pairs
