"""What a data set's size costs: files that did not change stay closed, and little is kept or done per picture."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.data.batches import BatchList
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.cache import READ_BYTES, CacheReport, LatentCache, TextCache
from lora_diffusion.data.folder import Sample, Scan, picture_facts, scan_folder
from lora_diffusion.data.listing import name_below
from lora_diffusion.training.batches import BatchSource, DrawOptions, Share, SourceOptions

BUCKETS = (Bucket(16, 16),)
_opened: list[str] | None = None


def _note_open(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | Path):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_note_open)  # cannot be taken away again, only told not to look


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that were opened, by anything in this process. Clear it to begin."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, where a real run would not trust them for two seconds."""
    monkeypatch.setattr("lora_diffusion.data.file_facts.SETTLED_NS", 0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / "set", 6)


def draw(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"a picture of thing {number}")
    return folder


def scan(folder: Path, memory: Path) -> Scan:
    return scan_folder(folder, buckets=BUCKETS, facts=picture_facts(memory, folder))


def of_kind(opened: Sequence[str], suffix: str) -> list[str]:
    return [Path(name).name for name in opened if name.endswith(suffix)]


@pytest.mark.usefixtures("settled")
def test_a_second_scan_finds_the_same_and_opens_no_picture(pictures: Path, tmp_path: Path, opened: list[str]) -> None:
    first = scan(pictures, tmp_path / "memory")
    assert len(of_kind(opened, ".png")) == 6
    opened.clear()
    assert scan(pictures, tmp_path / "memory") == first
    assert of_kind(opened, ".png") == []
    assert len(of_kind(opened, ".txt")) == 6, "captions are read every time"


@pytest.mark.usefixtures("settled")
@pytest.mark.skipif(os.name == "nt", reason="only POSIX tells when a file was changed whatever its times say")
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_an_edited_picture_is_read_again_although_its_size_and_time_are_as_before(
    pictures: Path, tmp_path: Path, opened: list[str], how: str
) -> None:
    path = pictures / "0002.png"
    old, new = (file.read_bytes().ljust(200, b"\0") for file in (path, pictures / "0004.png"))
    path.write_bytes(old)  # readers pass over what follows the end of a PNG
    before = scan(pictures, tmp_path / "memory").samples[2]
    status = path.stat()
    time.sleep(0.05)  # longer than a tick of the file system's clock, as `settled` trusts files at once
    if how == "in place":
        path.write_bytes(new)
    else:
        (tmp_path / "new.png").write_bytes(new)
        (tmp_path / "new.png").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    opened.clear()
    after = scan(pictures, tmp_path / "memory").samples[2]
    assert of_kind(opened, ".png") == ["0002.png"]
    assert after.content != before.content


@pytest.mark.usefixtures("settled")
def test_an_edited_caption_is_noticed(pictures: Path, tmp_path: Path) -> None:
    scan(pictures, tmp_path / "memory")
    (pictures / "0001.txt").write_text("a picture of sth else")
    assert scan(pictures, tmp_path / "memory").samples[1].caption == "a picture of sth else"


def test_a_picture_that_was_just_written_is_not_trusted(
    pictures: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_diffusion.data.file_facts.SETTLED_NS", 10**15)  # eleven days
    scan(pictures, tmp_path / "memory")
    opened.clear()
    scan(pictures, tmp_path / "memory")
    assert len(of_kind(opened, ".png")) == 6


@pytest.mark.usefixtures("settled")
def test_a_damaged_memory_costs_time_and_nothing_else(pictures: Path, tmp_path: Path, opened: list[str]) -> None:
    first = scan(pictures, tmp_path / "memory")
    (file,) = (tmp_path / "memory").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(b"PNG", b"GIF", 1), b"[]", whole[:64] + b"\n[]"):
        file.write_bytes(damaged)
        opened.clear()
        assert scan(pictures, tmp_path / "memory") == first
        assert len(of_kind(opened, ".png")) == 6


@pytest.mark.usefixtures("settled")
def test_what_cannot_be_used_is_read_and_reported_every_time(pictures: Path, tmp_path: Path) -> None:
    data = (pictures / "0003.png").read_bytes()
    (pictures / "0003.png").write_bytes(data[:-20])
    first = scan(pictures, tmp_path / "memory")
    assert [item.path.name for item in first.left_out] == ["0003.png"]
    assert scan(pictures, tmp_path / "memory") == first
    (pictures / "0003.png").write_bytes(data)
    assert len(scan(pictures, tmp_path / "memory").samples) == 6


@pytest.mark.usefixtures("settled")
def test_removed_pictures_are_forgotten(pictures: Path, tmp_path: Path) -> None:
    scan(pictures, tmp_path / "memory")
    (file,) = (tmp_path / "memory").iterdir()
    assert b"0005.png" in file.read_bytes()
    (pictures / "0005.png").unlink()
    scan(pictures, tmp_path / "memory")
    assert b"0005.png" not in file.read_bytes()
    assert b"0004.png" in file.read_bytes()


@pytest.mark.usefixtures("settled")
def test_a_scan_that_may_not_write_leaves_no_file(pictures: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    scan_folder(pictures, buckets=BUCKETS, facts=picture_facts(memory, pictures, is_kept=False))
    assert not memory.exists()


@pytest.mark.parametrize("root", ["set", ".", "/", "/set", "a/../set", "set/"])
def test_names_below_a_folder_are_those_that_pathlib_tells(root: str) -> None:
    path = Path(root) / "10_dog" / "a b.png"
    assert name_below(path, Path(root)) == path.relative_to(root).as_posix() == "10_dog/a b.png"


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, mean.abs() + 0.1


def encode_texts(captions: list[str]) -> dict[str, Tensor]:
    return {"hidden": torch.stack([torch.full((3, 2), float(len(caption))) for caption in captions])}


@pytest.mark.usefixtures("settled")
def test_a_warm_start_opens_no_cached_latents_and_no_cached_text(
    pictures: Path, tmp_path: Path, opened: list[str]
) -> None:
    samples = scan_folder(pictures, buckets=BUCKETS).samples
    captions = [sample.caption for sample in samples]
    cache = tmp_path / "cache"
    assert LatentCache(cache, "vae", encode).fill(samples, flips=True, batch_size=4).built == 12
    assert TextCache(cache, "clip", encode_texts).fill(captions, batch_size=4).built == 6
    opened.clear()
    assert LatentCache(cache, "vae", encode).fill(samples, flips=True, batch_size=4) == CacheReport(12, 0, 0)
    assert TextCache(cache, "clip", encode_texts).fill(captions, batch_size=4) == CacheReport(6, 0, 0)
    assert of_kind(opened, ".safetensors") == []


@pytest.mark.usefixtures("settled")
def test_cached_latents_that_changed_since_they_were_found_whole_are_looked_at(pictures: Path, tmp_path: Path) -> None:
    samples = scan_folder(pictures, buckets=BUCKETS).samples
    cache = tmp_path / "cache"
    LatentCache(cache, "vae", encode).fill(samples, flips=False, batch_size=4)
    path = sorted(cache.rglob("*.safetensors"))[0]
    time.sleep(0.05)  # a tick of the file system's clock
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert LatentCache(cache, "vae", encode).fill(samples, flips=False, batch_size=4) == CacheReport(5, 0, 1)
    path.unlink()
    assert LatentCache(cache, "vae", encode).fill(samples, flips=False, batch_size=4) == CacheReport(5, 1, 0)


def test_a_picture_takes_less_than_2_kilobytes_of_memory(tmp_path: Path) -> None:
    """Its sample, its notes, what a resume compares, its place in the batch list: all that is kept for a run."""
    count = 500
    folder = draw(tmp_path / "set", count)
    scan_folder(draw(tmp_path / "few", 2), buckets=BUCKETS)  # whatever is made once
    tracemalloc.start()
    try:
        found = scan_folder(folder, buckets=BUCKETS)
        fingerprint = {sample.id: sample.caption for sample in found.samples}
        batches = _batch_list(found.samples)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(fingerprint) == batches.num_draws_per_epoch == count
    assert held / count < 2000


def test_latents_in_memory_do_not_grow_with_the_data_set(pictures: Path, tmp_path: Path) -> None:
    samples = scan_folder(pictures, buckets=BUCKETS).samples
    large = 5 * READ_BYTES // 16  # bytes of one entry: six of them are twice the budget

    def encode_large(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.zeros(len(pixels), 1, 1, large // 8)
        return mean, mean

    cache = LatentCache(tmp_path / "cache", "vae", encode_large)
    cache.fill(samples, flips=False, batch_size=1)
    for sample in samples:
        cache.get(sample)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.unlink()
    built = cache.fill(samples, flips=False, batch_size=1).built
    assert built == 3, "three of these fit into the budget and were not missed"


class Watched(Sequence[Sample]):
    """Samples that count how often one is looked at."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.looks = samples, 0

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        self.looks += 1
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def _batch_list(samples: Sequence[Sample]) -> BatchList:
    return BatchList([s.bucket for s in samples], [s.id for s in samples], [1 for _ in samples], 4, 1)


def test_a_batch_looks_at_its_own_samples_however_many_there_are(tmp_path: Path) -> None:
    looks: list[int] = []
    for count in (8, 80):
        samples = scan_folder(draw(tmp_path / f"set{count}", count), buckets=BUCKETS).samples
        latents = LatentCache(None, "vae", encode)
        latents.fill(samples, flips=False, batch_size=8)
        watched = Watched(samples)
        source = BatchSource(
            watched, [SourceOptions()], _batch_list(samples), latents, DrawOptions((0, 1000)), Share(accumulation=2)
        )
        for index in range(4):
            assert len(source[index].names) == 4
        looks.append(watched.looks)
    assert looks[0] == looks[1] > 0


def test_batches_around_the_turn_of_an_epoch_are_not_planned_again_and_again() -> None:
    """An optimiser step of several micro-batches may begin in one epoch and end in the next."""
    count = 20_000
    batches = BatchList([Bucket(16, 16)] * count, [f"{i:016x}" for i in range(count)], [1] * count, 4, 1)
    last = batches.batches_per_epoch - 1
    first = [batches.batch(index) for index in (last, last + 1)]
    tracemalloc.start()
    try:
        again = [batches.batch(index) for index in (last, last + 1) * 20]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert again == first * 20
    assert peak < count, "planning an epoch of 20,000 pictures takes many bytes for each"


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.usefixtures("settled")
def test_ten_thousand_cached_pictures_are_ready_in_five_seconds(tmp_path: Path) -> None:
    """Seconds of CPU time for the folder, the latents, the texts and the first batch; half a minute to prepare them."""
    folder = draw(tmp_path / "set", 10_000)
    seconds: list[float] = []
    for _ in range(2):
        started = time.process_time()
        samples = scan(folder, tmp_path / "memory").samples
        latents = LatentCache(tmp_path / "cache", "vae", encode).fill(samples, flips=False, batch_size=64)
        captions = [sample.caption for sample in samples]
        texts = TextCache(tmp_path / "cache", "clip", encode_texts).fill(captions, batch_size=64)
        _batch_list(samples).batch(0)
        seconds.append(time.process_time() - started)
    assert (latents, texts) == (CacheReport(10_000, 0, 0), CacheReport(10_000, 0, 0))
    assert seconds[1] < 5
