"""Caches: the same numbers as without, under keys that cannot go out of date, whatever happens to their files."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.data.buckets import Bucket, Crop, Fit, Size
from lora_diffusion.data.cache import CacheReport, LatentCache, TextCache
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.folder import Sample, scan_folder
from lora_diffusion.errors import RunError

BUCKETS = (Bucket(16, 16), Bucket(32, 16))


def encode_images(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Means of 4x4 px blocks, and a deviation that depends on the sign."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, mean.abs() + 0.1


def encode_texts(captions: list[str]) -> dict[str, Tensor]:
    return {"hidden": torch.stack([torch.full((3, 2), float(len(caption))) for caption in captions])}


def encode_texts_and_pool(captions: list[str]) -> dict[str, Tensor]:
    hidden = encode_texts(captions)["hidden"]
    return {"hidden": hidden, "pooled": -hidden[:, 0]}


class Counting:
    """An encoder that remembers how many items it was given at a time."""

    def __init__(self, encode: Callable[..., object]) -> None:
        self.encode = encode
        self.sizes: list[int] = []

    def __call__(self, items: object) -> object:
        self.sizes.append(len(items))  # type: ignore[arg-type]
        return self.encode(items)


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(5):
        size = (32, 16) if index > 2 else (16, 16)
        image = Image.linear_gradient("L").resize(size).rotate(90 * index, expand=False).convert("RGB")
        image.putpixel((0, 0), (50 * index, 0, 255))
        image.save(folder / f"{index}.png")
    return scan_folder(folder, buckets=BUCKETS).samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fill(cache: LatentCache, samples: tuple[Sample, ...], flips: bool = True) -> CacheReport:
    return cache.fill(samples, flips=flips, batch_size=2)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_latents_from_memory_from_disk_and_without_a_folder_are_bit_for_bit_the_same(
    samples: tuple[Sample, ...], folder: Path
):
    fresh, bare = LatentCache(folder, "vae", encode_images), LatentCache(None, "vae", encode_images)
    assert fill(fresh, samples) == fill(bare, samples) == CacheReport(hits=0, built=10, rebuilt=0)
    warm, from_disk = (LatentCache(folder, "vae", encode_images, memory_bytes=size) for size in (2**20, 0))
    assert fill(warm, samples) == fill(from_disk, samples) == CacheReport(hits=10, built=0, rebuilt=0)
    for sample in samples:
        for flipped in (False, True):
            expected = fresh.get(sample, flipped)
            for cache in (bare, warm, from_disk):
                assert all(torch.equal(a, b) for a, b in zip(cache.get(sample, flipped), expected, strict=True))


def test_latents_have_the_buckets_shape_and_are_float32(samples: tuple[Sample, ...], folder: Path):
    cache = LatentCache(folder, "vae", lambda pixels: tuple(x.half() for x in encode_images(pixels)))  # type: ignore[arg-type]
    fill(cache, samples)
    for sample in samples:
        mean, std = cache.get(sample)
        assert mean.shape == std.shape == (3, sample.bucket.height // 4, sample.bucket.width // 4)
        assert mean.dtype == std.dtype == torch.float32


def test_flipped_latents_are_those_of_the_mirrored_picture(samples: tuple[Sample, ...], folder: Path):
    cache = LatentCache(folder, "vae", encode_images)
    fill(cache, samples)
    for sample in samples:
        assert torch.equal(cache.get(sample, True)[0], cache.get(sample)[0].flip(-1))
    assert not torch.equal(cache.get(samples[0], True)[0], cache.get(samples[0])[0])


def test_batches_hold_one_bucket_and_nothing_is_encoded_twice(samples: tuple[Sample, ...], folder: Path):
    encode = Counting(encode_images)
    cache = LatentCache(folder, "vae", encode)  # type: ignore[arg-type]
    fill(cache, samples, flips=False)
    assert encode.sizes == [2, 1, 2]
    fill(cache, (*samples, samples[0]), flips=False)
    assert encode.sizes == [2, 1, 2]
    fill(cache, samples, flips=True)  # now the mirror images only
    assert encode.sizes == [2, 1, 2] * 2


def test_every_thing_that_changes_the_numbers_changes_the_key(samples: tuple[Sample, ...]):
    base, sample = LatentCache(None, "vae", encode_images), samples[0]
    keys = [
        base.key(sample, False),
        base.key(sample, True),
        base.key(replace(sample, content="0" * 64), False),
        base.key(replace(sample, bucket=Bucket(24, 16)), False),
        base.key(replace(sample, fit=Fit(Size(20, 16), Crop(0, 0))), False),
        base.key(replace(sample, fit=Fit(sample.fit.resized, Crop(1, 0))), False),
        LatentCache(None, "other vae", encode_images).key(sample, False),
        LatentCache(None, "vae", encode_images, background=(0, 0, 0)).key(sample, False),
    ]
    assert len(set(keys)) == len(keys)
    same = replace(sample, image=Path("moved.png"), caption="other", repeats=9, id="x", source=3)
    assert base.key(same, False) == keys[0]


def test_the_filter_version_is_part_of_the_key(samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch):
    cache = LatentCache(None, "vae", encode_images)
    before = cache.key(samples[0], False)
    monkeypatch.setattr("lora_diffusion.data.cache.FILTER_VERSION", "other")
    assert cache.key(samples[0], False) != before


@pytest.mark.parametrize("offset", [0, 4, 60, -40, -1])
def test_one_flipped_byte_anywhere_is_noticed_and_mended(samples: tuple[Sample, ...], folder: Path, offset: int):
    expected = LatentCache(folder, "vae", encode_images)
    fill(expected, samples)
    for path in files(folder):
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
    cache = LatentCache(folder, "vae", encode_images)
    assert fill(cache, samples) == CacheReport(hits=0, built=0, rebuilt=10)
    assert fill(LatentCache(folder, "vae", encode_images), samples).hits == 10
    assert all(torch.equal(cache.get(s)[0], expected.get(s)[0]) for s in samples)


@pytest.mark.parametrize("damage", ["cut", "emptied", "swapped"])
def test_a_cut_emptied_or_swapped_file_is_noticed_and_mended(samples: tuple[Sample, ...], folder: Path, damage: str):
    fill(LatentCache(folder, "vae", encode_images), samples)
    first, second = files(folder)[:2]
    if damage == "swapped":
        shutil.copy(second, first)
    else:
        first.write_bytes(first.read_bytes()[: 100 if damage == "cut" else 0])
    assert fill(LatentCache(folder, "vae", encode_images), samples) == CacheReport(hits=9, built=0, rebuilt=1)


def test_a_folder_that_cannot_be_written_costs_one_warning(
    samples: tuple[Sample, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a file").write_text("in the way")
    cache = LatentCache(tmp_path / "a file" / "cache", "vae", encode_images, memory_bytes=0)
    with caplog.at_level(logging.WARNING):
        assert fill(cache, samples).built == 10
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text
    assert all(cache.get(sample, True)[0].isfinite().all() for sample in samples)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_folder_is_still_read(samples: tuple[Sample, ...], folder: Path):
    fill(LatentCache(folder, "vae", encode_images), samples[:2])
    folder.chmod(0o500)
    (folder / "latents").chmod(0o500)
    report = fill(LatentCache(folder, "vae", encode_images), samples)
    assert (report.hits, report.built) == (4, 6)


def test_a_copy_for_a_loader_worker_reads_and_never_encodes(samples: tuple[Sample, ...], folder: Path):
    cache = LatentCache(folder, "vae", encode_images, memory_bytes=0)
    fill(cache, samples)
    copy: LatentCache = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(samples[0])[0], cache.get(samples[0])[0])
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"0\.png: its cached latents are missing"):
        copy.get(samples[0])
    assert cache.get(samples[0])[0].isfinite().all()  # this process can encode


def test_a_picture_that_changed_or_went_after_the_scan_is_an_error_and_not_cached(
    samples: tuple[Sample, ...], folder: Path
):
    Image.new("RGB", (16, 16)).save(samples[1].image)
    with pytest.raises(DataError, match=r"1\.png: the file has changed"):
        fill(LatentCache(folder, "vae", encode_images), samples[1:2])
    samples[1].image.unlink()
    with pytest.raises(DataError, match=r"1\.png: cannot be read \(No such file"):
        fill(LatentCache(folder, "vae", encode_images), samples[1:2])
    assert not files(folder)


def test_latents_that_are_not_finite_stop_the_run(samples: tuple[Sample, ...], folder: Path):
    def broken(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode_images(pixels)
        mean[-1, 0, 0, 0] = float("nan")
        return mean, std

    with pytest.raises(RunError, match=r"1\.png: the VAE gives NaN"):
        fill(LatentCache(folder, "vae", broken), samples)


def test_memory_holds_no_more_than_its_budget(samples: tuple[Sample, ...], folder: Path):
    one_entry = 2 * 3 * 4 * 4 * 4
    cache = LatentCache(folder, "vae", encode_images, memory_bytes=2 * one_entry)
    fill(cache, samples[:3], flips=False)
    for sample in samples[:3]:
        cache.get(sample)
    for path in files(folder):
        path.unlink()
    copy: LatentCache = pickle.loads(pickle.dumps(cache))
    copy.get(samples[0])
    copy.get(samples[1])
    with pytest.raises(RunError):
        copy.get(samples[2])


def test_texts_are_encoded_once_and_read_back_bit_for_bit(folder: Path):
    encode = Counting(encode_texts)
    cache = TextCache(folder, "clip", encode)  # type: ignore[arg-type]
    assert cache.fill(["a", "bb", "a", ""], batch_size=2) == CacheReport(hits=0, built=3, rebuilt=0)
    assert encode.sizes == [2, 1]
    again = TextCache(folder, "clip", encode)  # type: ignore[arg-type]
    assert again.fill(["a", "bb", ""], batch_size=2) == CacheReport(hits=3, built=0, rebuilt=0)
    assert torch.equal(again.get("bb")["hidden"], torch.full((3, 2), 2.0))
    assert encode.sizes == [2, 1]


def test_all_tensors_of_a_caption_are_kept(folder: Path):
    TextCache(folder, "clip", encode_texts_and_pool).fill(["a", "bb"], batch_size=2)
    entry = TextCache(folder, "clip", encode_texts).get("bb")
    assert entry.keys() == {"hidden", "pooled"}
    assert torch.equal(entry["pooled"], torch.full((2,), -2.0))


def test_texts_of_another_encoder_are_not_found(folder: Path):
    TextCache(folder, "clip", encode_texts).fill(["a"], batch_size=1)
    assert TextCache(folder, "clip-skip2", encode_texts).fill(["a"], batch_size=1).built == 1


def test_a_damaged_text_entry_is_mended(folder: Path):
    TextCache(folder, "clip", encode_texts).fill(["a", "b"], batch_size=1)
    files(folder)[0].write_bytes(b"nonsense")
    assert TextCache(folder, "clip", encode_texts).fill(["a", "b"], batch_size=1) == CacheReport(1, 0, 1)


def test_a_caption_that_was_not_filled_is_encoded_and_leaves_no_file(folder: Path):
    cache = TextCache(folder, "clip", encode_texts)
    assert torch.equal(cache.get("abc")["hidden"], torch.full((3, 2), 3.0))
    assert not files(folder)
    with pytest.raises(RunError, match="not cached"):
        pickle.loads(pickle.dumps(cache)).get("never seen")


def test_texts_in_memory_stay_within_their_budget_however_many_captions_come_up():
    encode = Counting(encode_texts)
    cache = TextCache(None, "clip", encode, memory_bytes=2 * 3 * 2 * 4)  # type: ignore[arg-type]
    for caption in ("a", "b", "a", "c"):
        cache.get(caption)
    assert encode.sizes == [1, 1, 1]
    cache.get("a")  # used more recently than b
    assert encode.sizes == [1, 1, 1]
    cache.get("b")
    assert encode.sizes == [1, 1, 1, 1]


def test_an_empty_set_fills_an_empty_cache(folder: Path):
    nothing = CacheReport(0, 0, 0)
    assert LatentCache(folder, "vae", encode_images).fill([], flips=True, batch_size=4) == nothing
    assert TextCache(folder, "clip", encode_texts).fill([], batch_size=4) == nothing
