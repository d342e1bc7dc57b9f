"""Which picture sizes are trained, and how a picture is fitted to one of them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lora_diffusion.data.errors import DataError


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


Bucket = Size
"""A size that pictures are cut to, so that they can share a batch."""


class Crop(NamedTuple):
    """Where the bucket lies in the resized picture: its left and top edge in pixels."""

    left: int
    top: int


class Fit(NamedTuple):
    """A picture is resized to `resized`, then the bucket is cut out of it at `crop`."""

    resized: Size
    crop: Crop


def make_buckets(resolution: Size, *, min_side: int, max_side: int, step: int) -> tuple[Bucket, ...]:
    """All sizes with about the area of `resolution` whose sides are multiples of `step` px, sorted.

    Every width from `min_side` (rounded down to a step) to `max_side` (rounded up) gets the greatest height that
    keeps the area, and each size comes in both orientations. The list is the one that sd-scripts makes, so that
    pictures prepared for it are cut the same way. Raises DataError when `resolution` lies outside the limits.
    """
    _check_limits(resolution, min_side, max_side, step)
    area = resolution.width * resolution.height
    lowest = max(step, min_side // step * step)
    highest = -(-max_side // step) * step
    square = math.isqrt(area) // step * step
    buckets = {Bucket(square, square)}
    for width in range(lowest, highest + 1, step):
        height = min(highest, area // width // step * step)
        if height >= lowest:
            buckets |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(buckets))


def _check_limits(resolution: Size, min_side: int, max_side: int, step: int) -> None:
    text = f"resolution {resolution.width}x{resolution.height}"
    if step < 1:
        raise DataError(f"bucket_step is {step}; it must be at least 1 px.")
    if min(resolution) < step:
        raise DataError(f"{text} is smaller than the bucket step of {step} px. Raise resolution or lower bucket_step.")
    if min_side > min(resolution):
        raise DataError(f"{text} has a side below bucket_min {min_side}. Lower bucket_min or raise resolution.")
    if max_side < max(resolution):
        raise DataError(f"{text} has a side above bucket_max {max_side}. Raise bucket_max or lower resolution.")


def assign_bucket(size: Size, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of exactly this size, else the one whose width/height is nearest (the first of equals)."""
    if size in buckets:
        return Bucket(*size)
    ratio = size.width / size.height
    return min(buckets, key=lambda bucket: abs(ratio - bucket.width / bucket.height))


def fit(size: Size, bucket: Bucket) -> Fit:
    """Scale a picture of `size` so that it just covers `bucket`, and cut the bucket out of its centre."""
    scale = scale_to_cover(size, bucket)
    resized = Size(
        max(bucket.width, int(size.width * scale + 0.5)),
        max(bucket.height, int(size.height * scale + 0.5)),
    )
    return Fit(resized, Crop((resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2))


def scale_to_cover(size: Size, bucket: Bucket) -> float:
    """How many times larger (above 1) or smaller (below 1) the picture becomes."""
    return max(bucket.width / size.width, bucket.height / size.height)


def lost_fraction(size: Size, bucket: Bucket) -> float:
    """Which share of the picture's area the crop cuts away, in [0, 1)."""
    resized = fit(size, bucket).resized
    return 1 - bucket.width * bucket.height / (resized.width * resized.height)
