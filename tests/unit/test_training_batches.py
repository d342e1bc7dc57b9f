"""Batches of a run: the same at any time, in any process, with any number of workers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_diffusion.data.buckets import Bucket, Crop, Fit, Size, fit
from lora_diffusion.data.folder import scan_folder
from lora_diffusion.errors import RunError
from lora_diffusion.streams import stream_seed
from lora_diffusion.training.batches import Batch, BatchSource, LoadedBatches, Share, sample_sizes
from lora_diffusion.training.validation import split_validation
from tests.training_runs import draw_pictures, prepare, write_config


@pytest.fixture(scope="module")
def source(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> BatchSource:
    folder = tmp_path_factory.mktemp("batches")
    dataset = {"flip": True, "caption_dropout": 0.3, "repeats": 2}
    loss = {"noise_offset": 0.1}
    config = write_config(folder / "run.toml", tiny_sd1, draw_pictures(folder / "pictures"), dataset=dataset, loss=loss)
    return prepare(config, "run.batch_size=4").source


def _equal(a: Batch, b: Batch) -> bool:
    tensors = ("latents", "noise", "timesteps", "weights", "sizes")
    return a.captions == b.captions and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_same_index_gives_the_same_batch(source: BatchSource) -> None:
    later = source[9]
    assert _equal(source[0], source[0])
    assert _equal(later, source[9])
    assert not torch.equal(source[0].noise[0], source[1].noise[0])


def test_sizes_are_those_of_the_file_the_crop_and_the_bucket(source: BatchSource) -> None:
    size, bucket = Size(101, 50), Bucket(64, 64)
    sample = replace(source.samples[0], size=size, bucket=bucket, fit=fit(size, bucket))
    assert sample.fit == Fit(Size(129, 64), Crop(32, 0))
    assert sample_sizes(sample).tolist() == [50, 101, 0, 32, 64, 64]
    assert sample_sizes(sample, flipped=True).tolist() == [50, 101, 0, 33, 64, 64], "129 - 64 - 32 px lie to the right"


def test_a_batchs_sizes_are_those_of_its_pictures(source: BatchSource) -> None:
    samples = {sample.image.name: sample for sample in source.samples}
    batch = source[0]
    assert [tuple(sizes[:2].tolist()) for sizes in batch.sizes] == [samples[name].size[::-1] for name in batch.names]
    assert batch.sizes.dtype == torch.float32


def test_a_folder_in_two_tables_has_noise_and_timesteps_of_its_own_in_each(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, validation={"every": 1, "fraction": 0.3})
    second = [f"dataset.1.path={pictures}", "dataset.1.resolution=64", "validation.every=1"]
    alone, trainer = prepare(config), prepare(config, *second)
    samples = trainer.source.samples
    images = [sample.image for sample in samples]
    ids = [[sample.id for sample in samples if sample.source == table] for table in (0, 1)]
    assert len(set(ids[0]) | set(ids[1])) == len(trainer.facts["dataset"]) == len(samples) == 14
    assert set(ids[0]) == {sample.id for sample in alone.source.samples}, "runs without twins stay as they are"
    assert trainer.validator is not None
    assert {sample.image for sample in trainer.validator.samples}.isdisjoint(images)
    assert len({sample.id for sample in trainer.validator.samples}) == 6
    drawn: dict[str, set[int]] = {}
    for index in range(trainer.source.batches.batches_per_epoch):
        batch = trainer.source[index]
        for name, timestep in zip(batch.names, batch.timesteps.tolist(), strict=True):
            drawn.setdefault(name, set()).add(timestep)
    assert [len(timesteps) for timesteps in drawn.values()] == [2] * 7


def test_copies_of_a_picture_are_kept_for_validation_together_or_not_at_all(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "5_all")
    shutil.copytree(pictures, tmp_path / "10_face")
    samples = scan_folder(tmp_path, buckets=[Bucket(32, 32)]).samples
    held_out: set[str] = set()
    for seed in range(10):
        training, validation = split_validation(samples, 0.3, seed)
        assert {sample.content for sample in training}.isdisjoint(sample.content for sample in validation)
        assert (len(training), len(validation)) == (14, 6)
        held_out |= {sample.content for sample in validation}
    assert len(held_out) > 5, "the seed chooses"
    assert split_validation(samples[:1] + samples[10:11], 0.3, 0) == ([samples[0], samples[10]], [])


def test_which_pictures_are_kept_for_validation_is_said_by_their_ids_as_ever(tmp_path: Path) -> None:
    samples = scan_folder(draw_pictures(tmp_path), buckets=[Bucket(32, 32)]).samples
    ranked = sorted(samples, key=lambda sample: stream_seed(7, "validation", sample.id))
    training, validation = split_validation(samples, 0.3, 7)
    assert validation == [sample for sample in samples if sample in ranked[:3]]
    assert training == [sample for sample in samples if sample in ranked[3:]]


def test_a_run_that_can_keep_no_picture_for_validation_says_so(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 1)
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, validation={"every": 1, "fraction": 0.3})
    trainer = prepare(config, f"dataset.1.path={pictures}", "dataset.1.resolution=32")
    assert trainer.validator is None
    assert "no picture can be kept out to measure on: there is only one" in caplog.text


def test_a_resolution_that_cannot_be_trained_exactly_is_told_with_the_sizes_that_can(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures", 2))
    prepare(config, "dataset.0.buckets=false")
    assert "is trained at" not in caplog.text
    samples = prepare(config, "dataset.0.buckets=false", "dataset.0.resolution=[50, 64]").source.samples
    assert {sample.bucket for sample in samples} == {(32, 64)}
    assert "resolution 50x64 is trained at 32x64, as sides are multiples of 32 px. Set it to that, or to 64x64." in (
        caplog.text
    )


def test_number_of_workers_changes_nothing(source: BatchSource) -> None:
    alone = list(LoadedBatches(source, 3, 9, workers=0))
    helped = list(LoadedBatches(source, 3, 9, workers=2))
    assert len(alone) == 6
    assert all(_equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without asking them")
def test_workers_outlive_signals_that_are_sent_to_all_processes_of_a_run(source: BatchSource) -> None:
    batches = LoadedBatches(source, 0, 20, workers=2)
    drawn = [next(batches), next(batches)]  # both workers have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
    drawn += list(batches)
    assert all(_equal(batch, source[index]) for index, batch in enumerate(drawn))
    assert len(drawn) == 20


def test_workers_end_with_the_training_also_after_an_error_that_somebody_keeps(source: BatchSource) -> None:
    broken = BatchSource(source.samples, source.sources, source.batches, source.latents, source.draw, source.share)
    broken.sources = []  # every caption is looked for in vain
    batches = LoadedBatches(broken, 0, 20, workers=2)
    with pytest.raises(IndexError) as error:
        next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert multiprocessing.active_children() == []
    assert "_is_flipped" in str(error.value), "the traceback of the worker"
    assert list(batches) == []


def test_a_worker_encodes_no_picture_whose_latents_are_gone_and_says_so(tiny_sd1: Path, tmp_path: Path) -> None:
    source = prepare(write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))).source
    shutil.rmtree(tmp_path / "cache")
    batches = LoadedBatches(source, 0, 2, workers=1)
    with pytest.raises(
        RunError, match=r"^[^\n]*\.png: its cached latents are missing or damaged, and a data loader worker"
    ):
        next(batches)
    batches.close()
    assert not (tmp_path / "cache").exists()
    assert source[0].latents.isfinite().all()  # this process can encode


def test_two_processes_together_see_what_one_sees(source: BatchSource) -> None:
    for index in range(source.batches.batches_per_epoch):
        whole = source[index]
        shares = []
        for rank in (0, 1):
            part = BatchSource(
                source.samples, source.sources, source.batches, source.latents, source.draw, Share(rank, 2, 1)
            )
            shares.append(part[index])
        real = torch.cat([share.weights for share in shares]) > 0
        noise = torch.cat([share.noise for share in shares])[real]
        assert torch.equal(noise, whole.noise)
        # Gradients are averaged over processes, so each process's weights are twice as large.
        assert sum(float(share.weights.sum()) for share in shares) / 2 == pytest.approx(1.0)


def test_every_picture_comes_once_per_repeat_and_epoch(source: BatchSource) -> None:
    names = [name for index in range(source.batches.batches_per_epoch) for name in source[index].names]
    assert sorted(names) == sorted([sample.image.name for sample in source.samples] * 2)


def test_repeats_of_a_picture_have_noise_of_their_own(source: BatchSource) -> None:
    noises = {}
    for index in range(source.batches.batches_per_epoch):
        batch = source[index]
        for name, noise in zip(batch.names, batch.noise, strict=True):
            noises.setdefault(name, []).append(noise)
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in noises.values())
    assert len(noises) == 10


def test_weights_of_an_accumulated_step_sum_to_one(source: BatchSource) -> None:
    accumulated = BatchSource(
        source.samples,
        source.sources,
        source.batches,
        source.latents,
        source.draw,
        replace(source.share, accumulation=3),
    )
    sizes = [len(accumulated[i].weights) for i in range(3)]
    total = sum(float(accumulated[i].weights.sum()) for i in range(3))
    assert total == pytest.approx(1.0)
    assert float(accumulated[0].weights[0]) == pytest.approx(1 / sum(sizes))  # each picture counts the same
