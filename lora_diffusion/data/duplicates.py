"""Pictures that look alike: resaved, resized or slightly edited copies that would be trained twice. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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

Hash = NDArray[np.bool_]


def find_near_duplicates(samples: Sequence[Sample], track: Track = silent) -> list[tuple[Path, Path]]:
    """Pairs of pictures with different bytes that look the same, in the order of `samples`."""
    paths: list[Path] = []
    contents: list[str] = []
    hashes: list[Hash] = []
    with quiet_pillow():
        for sample in track(samples, "Comparing images"):
            try:
                image = open_image(sample.image)
            except ImageError as error:
                logger.warning("%s: %s", printable(str(sample.image)), error)
                continue
            hashes.append(perceptual_hash(image))
            paths.append(sample.image)
            contents.append(sample.content)
    return [(paths[i], paths[j]) for i, j in close_pairs(hashes) if contents[i] != contents[j] and paths[i] != paths[j]]


def perceptual_hash(image: Image.Image) -> Hash:
    """The bits by which pictures are compared, flat."""
    import imagehash  # takes a second, and few commands need it

    return np.asarray(imagehash.phash(image, hash_size=HASH_SIDE).hash, dtype=np.bool_).flatten()


def close_pairs(hashes: Sequence[Hash]) -> Iterator[tuple[int, int]]:
    """Index pairs i < j of hashes that differ in at most MAX_DISTANCE bits. A thousand equal ones make 499 500."""
    if not hashes:
        return
    table = np.stack(list(hashes)).astype(np.float32) * 2 - 1  # (pictures, bits) of +1 and -1
    least = table.shape[1] - 2 * MAX_DISTANCE  # the scalar product at that distance
    for i in range(len(table) - 1):
        for j in np.flatnonzero(table[i + 1 :] @ table[i] >= least):
            yield i, i + 1 + int(j)
