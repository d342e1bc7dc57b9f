"""Training on a base that is kept in 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.load import load_model
from lora_diffusion.models.quantise import QuantisedLinear
from lora_diffusion.training.trainer import Trainer
from tests.training_runs import ROOT, draw_pictures, prepare, tensor_hash, write_config

kinds = pytest.mark.parametrize("quantise", ["nf4", "int8"])


def _quantised(trainer: Trainer) -> list[QuantisedLinear]:
    return [module for module in trainer.loss.model.modules() if isinstance(module, QuantisedLinear)]


def _validation_losses(trainer: Trainer) -> tuple[float, float]:
    """Before and after training, on pictures kept out of it, at fixed timesteps with fixed noise."""
    assert trainer.validator is not None
    before = trainer.validator.measure(trainer.loss, trainer.accelerator.device)
    trainer.fit()
    return before, trainer.validator.measure(trainer.loss, trainer.accelerator.device)


def test_whole_run_writes_an_adapter_that_draws_on_the_plain_and_on_the_quantised_base(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        draw_pictures(tmp_path / "pictures"),
        model={"quantise": "nf4", "gradient_checkpointing": True},
        preview={"every": 3, "prompts": ["a red cat"], "steps": 2},
        optimizer={"lr": 1e-2},
    )
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 3
    file = AdapterFile.read(tmp_path / "run" / "test.safetensors")
    for quantise in ("none", "nf4"):
        engine = Engine(load_model(tiny_sd1, quantise=quantise))
        engine.load_adapter("test", file)
        requests = [Request("a red cat", steps=2, size=(32, 32), adapters={"test": s}) for s in (0.0, 1.0)]
        without, with_adapter = engine.generate(requests)
        assert without.tobytes() != with_adapter.tobytes()


@kinds
def test_stopped_and_resumed_run_gives_the_same_adapter(tiny_sd1: Path, tmp_path: Path, quantise: str) -> None:
    pictures, model = draw_pictures(tmp_path / "pictures"), {"quantise": quantise}
    whole = write_config(
        tmp_path / "whole.toml", tiny_sd1, pictures, model=model, run={"output": str(tmp_path / "whole")}
    )
    expected = tensor_hash(prepare(whole).fit())
    config = write_config(tmp_path / "parts.toml", tiny_sd1, pictures, model=model)
    first = prepare(config)
    assert _quantised(first)
    do_what_is_due = first.do_what_is_due

    def stop_after_three() -> None:
        do_what_is_due()
        first.stop.reason = "test" if first.step == 3 else None

    first.do_what_is_due = stop_after_three
    first.fit()
    assert first.step == 3
    assert tensor_hash(prepare(config, resume=True).fit()) == expected


def test_resuming_on_another_kind_of_base_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"), run={"steps": 3})
    prepare(config, "model.quantise=nf4").fit()
    with pytest.raises(UserError, match=r"model\.quantise: nf4 → int8"):
        prepare(config, "model.quantise=int8", resume=True)


@kinds
def test_training_lowers_the_loss(tiny_sd1: Path, tmp_path: Path, quantise: str) -> None:
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        draw_pictures(tmp_path / "pictures"),
        run={"steps": 60},
        model={"quantise": quantise},
        optimizer={"lr": 1e-2},
        validation={"every": 1000, "fraction": 0.2},
    )
    before, after = _validation_losses(prepare(config))
    assert after < 0.95 * before, f"{before:.4f} → {after:.4f}"


def test_training_on_nf4_lowers_the_loss_on_the_data_set_that_ships(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "ink.toml",
        ROOT / "samples" / "base",
        ROOT / "samples" / "ink",
        run={"steps": 30, "batch_size": 4},
        model={"quantise": "nf4"},
        adapter={"rank": 8, "alpha": 8.0, "targets": "attention-mlp"},
        dataset={"resolution": 64},
        validation={"every": 1000, "fraction": 0.2},
    )
    trainer = prepare(config)
    assert len(_quantised(trainer)) == 184, "every linear layer of the UNet"
    before, after = _validation_losses(trainer)
    assert after < 0.9 * before, f"{before:.4f} → {after:.4f}"
