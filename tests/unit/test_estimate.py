"""What `check` says of memory and time against what a training takes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from lora_diffusion.check import check_run
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.models.checkpointing import checkpoint_blocks
from lora_diffusion.models.heap import trim_heap
from lora_diffusion.models.load import load_model
from lora_diffusion.streams import stream
from lora_diffusion.training.estimate import _Probe, estimate_step
from lora_diffusion.training.graph import Inputs, Shape, shape_of
from lora_diffusion.training.memory import PeakMemory, resident_bytes
from lora_diffusion.training.recording import NUM_WARM_UPS, StepRecordings
from tests.clock import count_passes
from tests.tiny import make_tiny_sd1, make_tiny_sdxl
from tests.training_runs import draw_pictures, prepare, write_config


@pytest.fixture
def however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step counts as a short one, also on a machine that is busy."""
    for name in ("_QUICK_S", "_LAUNCHED_S"):
        monkeypatch.setattr(f"lora_diffusion.training.estimate.{name}", math.inf)


def test_the_peak_is_what_was_held_at_most() -> None:
    size = 200 * 2**20
    trim_heap()  # or the tensor takes freed memory of other tests, which is resident already
    before = resident_bytes()
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(size // 4)
        del held

    assert 0.99 * size <= memory.bytes - before < 1.5 * size  # parts of pages may have been there


def test_the_largest_batch_follows_from_what_is_free(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    report = check_run(TrainConfig.load(config, []))
    assert report.largest_batch > 100 and not any("memory" in finding.what for finding in report.findings)

    monkeypatch.setattr("lora_diffusion.training.estimate.memory_limit", lambda _: 2**20)
    report = check_run(TrainConfig.load(config, []))
    assert report.largest_batch == 0
    assert "not even one picture" in report.findings[0].items[0]
    assert "gradient_checkpointing" in report.findings[0].items[0]


@pytest.mark.usefixtures("however_slow")
@pytest.mark.parametrize("make", [make_tiny_sd1, make_tiny_sdxl])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_time_is_that_of_steps_as_the_run_launches_them(
    make: Callable[[Path], Path], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same tensors, replayed as the run replays them. All pictures are of one size."""
    seen: list[tuple[StepRecordings, Shape]] = []
    call = StepRecordings.__call__

    def watched(steps: StepRecordings, inputs: Inputs) -> None:
        call(steps, inputs)
        seen.append((steps, shape_of(inputs)))

    monkeypatch.setattr(StepRecordings, "__call__", watched)
    config = write_config(
        tmp_path / "run.toml",
        make(tmp_path / "base"),
        draw_pictures(tmp_path / "pictures", 4),
        run={"precision": precision, "steps": 3},
        dataset={"buckets": False},
        validation={"every": 0},
    )
    report = check_run(TrainConfig.load(config, []))
    told = list(seen)
    prepare(config).fit()
    trained = seen[len(told) :]

    assert report.seconds_per_step > 0
    assert told[-1][0].num_recordings == 1
    assert {shape for _, shape in told} == {shape for _, shape in trained}


@pytest.mark.usefixtures("however_slow")
def test_time_told_is_of_the_launched_step_times_the_micro_batches(tiny_sd1: Path) -> None:
    model = load_model(str(tiny_sd1), dtype=torch.float32, device=torch.device("cpu"))
    text = model.encode_text([""])
    weight = model.unet.conv_in.weight.requires_grad_(True)
    calls: list[int] = []

    def launch(inputs: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        calls.append(len(inputs[0]["0.latents"]))
        time.sleep(0.3)  # several times what the tiny base's own operations take

    step = estimate_step(model, (32, 32), 2, encode=lambda: text, accumulation=3, launch=launch)
    assert weight.grad is None
    assert step.seconds >= 3 * 0.3
    assert len(calls) > NUM_WARM_UPS + 1 and set(calls) == {2}


@pytest.mark.parametrize(
    ("every", "num_validations"), [(0, 0), (4, 2), (6, 1), (7, 1)], ids=["none", "on the way", "at the end", "too late"]
)
def test_time_of_the_run_is_that_of_its_validations_too(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, num_validations: int
) -> None:
    count_passes(monkeypatch, without_gradients_s=10.0)
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        draw_pictures(tmp_path / "pictures"),
        run={"steps": 6, "batch_size": 3},
        validation={"every": every, "fraction": 0.2},
    )
    report = check_run(TrainConfig.load(config, []))

    validation = num_validations * 2 * 2 * 10.0  # of 2 of 10 pictures, whose 4 timesteps are 3 rows and 1
    assert (report.seconds_per_step, report.validation_seconds) == (1.0, validation)
    assert report.training_seconds == 6.0 + validation


@pytest.mark.usefixtures("however_slow")
def test_where_memory_is_short_for_launching_a_whole_step_its_operations_time_is_told(tiny_sd1: Path) -> None:
    model = load_model(str(tiny_sd1), dtype=torch.float32, device=torch.device("cpu"))
    text = model.encode_text([""])
    model.unet.conv_in.weight.requires_grad_(True)

    def launch(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert estimate_step(model, (32, 32), 1, encode=lambda: text, accumulation=1, launch=launch).seconds > 0

    def fail(_: object) -> None:
        raise RuntimeError("a kernel has failed")

    with pytest.raises(RuntimeError, match="a kernel has failed"):
        estimate_step(model, (32, 32), 1, encode=lambda: text, accumulation=1, launch=fail)


@pytest.mark.usefixtures("however_slow")
def test_memory_is_that_of_every_shape_of_a_batch(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of short ones, which the largest would not tell."""
    pictures = draw_pictures(tmp_path / "pictures", 5)
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        pictures,
        run={"batch_size": 3},
        dataset={"buckets": False},
        validation={"every": 0},
    )
    run = _Probe.run

    def watched(probe: _Probe, batch_size: int) -> tuple[float, int]:
        seconds, peak = run(probe, batch_size)
        return seconds, peak + (2**33 if batch_size == 2 else 0)

    monkeypatch.setattr(_Probe, "run", watched)
    assert check_run(TrainConfig.load(config, [])).memory_bytes > 2**33


def test_what_training_refuses_is_refused(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "a.toml", tiny_sd1, pictures, preview={"prompts": ["a cat"], "size": [50, 50]})
    with pytest.raises(UserError, match=r"50.*multiples of"):
        check_run(TrainConfig.load(config))
    assert not (tmp_path / "run").exists(), "nothing is written"

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = write_config(tmp_path / "b.toml", tiny_sd1, pictures, optimizer={"name": "adamw8bit"})
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_run(TrainConfig.load(config))


def kept_and_gradients(base: Path, only_outer: bool | None) -> tuple[int, torch.Tensor]:
    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu"))
    model.unet.train()
    for parameter in model.unet.parameters():
        parameter.requires_grad_(False)
    weight = model.unet.conv_in.weight.requires_grad_(True)
    if only_outer is not None:
        checkpoint_blocks(model.unet, only_outer=only_outer)
    text = model.encode_text([""])
    kept = _Probe(model, (64, 64), lambda: text).kept_bytes()
    noisy = torch.randn(1, model.latent_channels, 16, 16, generator=stream(0, "noisy"))
    prediction = model.predict(noisy, torch.tensor([500]), text)
    (gradient,) = torch.autograd.grad(prediction.square().mean(), [weight])
    return kept, gradient


def test_checkpointed_blocks_keep_less_and_give_the_same_gradients(tiny_sd1: Path) -> None:
    none, outer, every = (kept_and_gradients(tiny_sd1, only) for only in (None, True, False))

    assert every[0] < outer[0] < none[0]
    assert torch.equal(none[1], outer[1]) and torch.equal(none[1], every[1])
