"""Bucket lists, and how pictures are fitted to them."""

from __future__ import annotations

import pytest

from lora_diffusion.data.buckets import Bucket, Crop, Fit, Size, assign_bucket, fit, lost_fraction, make_buckets
from lora_diffusion.data.errors import DataError

BUCKETS_512 = make_buckets(Size(512, 512), min_side=256, max_side=1024, step=64)


def test_the_list_for_512_is_the_one_of_sd_scripts():
    half = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    assert set(BUCKETS_512) == {(512, 512), *half, *((h, w) for w, h in half)}
    assert len(BUCKETS_512) == 17


@pytest.mark.parametrize(
    ("side", "limits", "step", "count"),
    [
        (512, (320, 960), 64, 9),
        (768, (256, 1024), 64, 19),
        (1024, (256, 1024), 64, 25),
        (1024, (256, 2048), 64, 41),
        (1024, (512, 2048), 64, 33),
        (1024, (256, 2048), 32, 81),
    ],
)
def test_lists_have_as_many_buckets_as_those_of_sd_scripts(side: int, limits: tuple[int, int], step: int, count: int):
    low, high = limits
    assert len(make_buckets(Size(side, side), min_side=low, max_side=high, step=step)) == count


def test_buckets_are_sorted_multiples_of_the_step_and_no_larger_than_the_area():
    buckets = make_buckets(Size(64, 64), min_side=30, max_side=130, step=8)
    assert buckets == tuple(sorted(set(buckets)))
    assert all(side % 8 == 0 and 24 <= side <= 136 for bucket in buckets for side in bucket)
    assert all(width * height <= 64 * 64 for width, height in buckets)
    assert all((height, width) in buckets for width, height in buckets)


def test_an_oblong_resolution_is_one_of_its_own_buckets():
    assert (768, 512) in make_buckets(Size(768, 512), min_side=256, max_side=1024, step=64)


@pytest.mark.parametrize(
    ("resolution", "min_side", "max_side", "step", "named"),
    [
        (Size(32, 32), 8, 64, 64, "bucket step"),
        (Size(512, 512), 640, 1024, 64, "bucket_min"),
        (Size(512, 512), 256, 448, 64, "bucket_max"),
        (Size(512, 512), 256, 1024, 0, "bucket_step"),
    ],
)
def test_limits_that_exclude_the_resolution_are_an_error_that_names_the_key(
    resolution: Size, min_side: int, max_side: int, step: int, named: str
):
    with pytest.raises(DataError, match=named):
        make_buckets(resolution, min_side=min_side, max_side=max_side, step=step)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        (Size(384, 640), Bucket(384, 640)),
        (Size(1, 1), Bucket(512, 512)),
        (Size(3000, 2000), Bucket(640, 384)),
        (Size(4000, 4), Bucket(1024, 256)),
        (Size(4, 4000), Bucket(256, 1024)),
    ],
)
def test_a_picture_gets_the_bucket_of_its_shape(size: Size, bucket: Bucket):
    assert assign_bucket(size, BUCKETS_512) == bucket


def test_equally_near_buckets_go_to_the_first():
    assert assign_bucket(Size(10, 10), (Bucket(64, 128), Bucket(96, 64))) == Bucket(64, 128)


def test_a_picture_is_scaled_to_cover_its_bucket_and_cut_at_the_centre():
    assert fit(Size(1000, 500), Bucket(64, 64)) == Fit(Size(128, 64), Crop(32, 0))
    assert fit(Size(500, 1000), Bucket(64, 64)) == Fit(Size(64, 128), Crop(0, 32))
    assert fit(Size(64, 64), Bucket(64, 64)) == Fit(Size(64, 64), Crop(0, 0))


def test_every_picture_covers_its_bucket_whatever_its_size():
    sizes = [Size(width, height) for width in range(1, 2000, 97) for height in range(1, 2000, 89)]
    assert len(sizes) > 400
    for size in sizes:
        bucket = assign_bucket(size, BUCKETS_512)
        resized, crop = fit(size, bucket)
        assert resized.width >= bucket.width and resized.height >= bucket.height
        assert 0 <= crop.left <= resized.width - bucket.width
        assert 0 <= crop.top <= resized.height - bucket.height


def test_the_lost_share_of_the_area_is_what_the_crop_cuts_away():
    assert lost_fraction(Size(128, 64), Bucket(64, 64)) == pytest.approx(0.5)
    assert lost_fraction(Size(512, 512), Bucket(64, 64)) == 0
