"""A loss that is not a number ends the run with names, and never reaches a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_diffusion.errors import RunError
from lora_diffusion.training.tracking import read_metrics
from lora_diffusion.training.trainer import Trainer
from tests.training_runs import draw_pictures, prepare, write_config


def test_nan_latents_stop_the_run_with_step_file_and_advice(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, pictures))
    poisoned = trainer.source.batches.batch(2)[0]  # first drawn at step 3
    name = trainer.source.samples[poisoned.sample].image.name
    get = trainer.source.latents.get

    def get_poisoned(sample, flipped=False):
        mean, std = get(sample, flipped)
        return (mean * float("nan"), std) if sample.image.name == name else (mean, std)

    trainer.source.latents.get = get_poisoned
    with pytest.raises(RunError, match=rf"loss became nan at step 3 .*{name}.*lr"):
        trainer.fit()

    saved = list((tmp_path / "run").rglob("*.safetensors"))
    assert saved
    for path in saved:
        assert all(torch.isfinite(tensor.float()).all() for tensor in load_file(path).values()), path
    assert prepare(tmp_path / "run.toml", resume=True).step == 2


def test_adapter_with_a_non_finite_weight_is_not_written(tiny_sd1: Path, tmp_path: Path) -> None:
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures")))
    with torch.no_grad():
        trainer.parameters[0].view(-1)[0] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        trainer.exporter.write(tmp_path / "bad.safetensors", 1)
    assert not (tmp_path / "bad.safetensors").exists()


def overflowing(config: Path, num_steps: int) -> Trainer:
    """A trainer with fp16's loss scaler, whose gradients are not finite in the first `num_steps` steps."""
    trainer = prepare(config, "run.cuda_graph=false")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    for parameter in trainer.parameters:
        parameter.register_hook(lambda gradient: gradient * (float("nan") if trainer.step < num_steps else 1.0))
    return trainer


def test_gradients_that_never_become_finite_in_fp16_end_the_run(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_diffusion.training.trainer._MAX_NOT_FINITE", 3)
    trainer = overflowing(write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures")), 6)
    with pytest.raises(RunError, match="gradient norm became nan at step 4"):
        trainer.fit()
    assert [line["grad_norm"] for line in read_metrics(trainer.run.metrics)] == [None] * 3


def test_a_loss_scale_that_is_lowered_for_some_steps_ends_nothing(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_diffusion.training.trainer._MAX_NOT_FINITE", 3)
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    overflowing(config, 3).fit()
    assert "changed nothing" not in caplog.text

    overflowing(write_config(config, tiny_sd1, tmp_path / "pictures", run={"steps": 3}), 3).fit()
    assert "The last 3 steps changed nothing: their gradients were not finite in fp16." in caplog.text
