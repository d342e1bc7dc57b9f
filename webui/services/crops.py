"""Which bucket each picture falls into, and what the crop cuts away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_diffusion.data.buckets import Bucket, Size, assign_bucket, fit, lost_fraction, make_buckets, scale_to_cover
from lora_diffusion.errors import UserError

MIN_RESOLUTION, MAX_RESOLUTION = 64, 2048


@dataclass(frozen=True)
class CropView:
    """Where the crop lies in a picture. left, top, width, height: shares of its sides in [0, 1].

    lost: share of the area cut away. enlargement: how many times larger the picture becomes (below 1: smaller).
    """

    bucket: Bucket
    left: float
    top: float
    width: float
    height: float
    lost: float
    enlargement: float


def usual_step(resolution: int) -> int:
    """What bucket sides are multiples of in bases for this resolution: SDXL, SD 1.x and 2.x, the shipped miniature."""
    return 64 if 256 <= resolution < 1024 else 32


def buckets_for(resolution: int, step: int) -> Sequence[Bucket]:
    """The buckets that a run with this resolution and step uses unless told otherwise. Raises UserError."""
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or not 1 <= step <= resolution // 2:
        raise UserError(
            f"The resolution lies between {MIN_RESOLUTION} and {MAX_RESOLUTION}, the step between 1 and half of it."
        )
    return make_buckets(
        Size(resolution, resolution), min_side=max(step, resolution // 2), max_side=resolution * 2, step=step
    )


def crop_view(size: Size, buckets: Sequence[Bucket]) -> CropView:
    """How a picture of `size`, upright, would be cut."""
    bucket = assign_bucket(size, buckets)
    resized, crop = fit(size, bucket)
    return CropView(
        bucket,
        crop.left / resized.width,
        crop.top / resized.height,
        bucket.width / resized.width,
        bucket.height / resized.height,
        lost_fraction(size, bucket),
        scale_to_cover(size, bucket),
    )


def count_buckets(crops: Mapping[str, CropView]) -> list[tuple[Bucket, int]]:
    """(bucket, number of pictures), in the order of their width."""
    return sorted(Counter(crop.bucket for crop in crops.values()).items())
