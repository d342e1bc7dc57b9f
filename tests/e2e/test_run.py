"""A whole run from the command line: what it leaves behind, and that its parts agree with each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.generation.infotext import read_png
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.checkpoint import save_checkpoint
from lora_diffusion.training.tracking import read_metrics
from tests.training_runs import ROOT, draw_pictures, prepare, tensor_hash, write_config

STEPS = 6
PROMPTS = ["a red cat", "a blue cat"]


def _train(config: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", "--config", str(config), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_process_of_its_own_trains_with_all_that_bitsandbytes_has(tiny_sd1: Path, tmp_path: Path) -> None:
    """It imports torch's compiler, which trainings put off, in parts. In this process others have imported it."""
    pytest.importorskip("bitsandbytes")
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        draw_pictures(tmp_path / "pictures"),
        run={"steps": 3},
        model={"quantise": "nf4"},
        optimizer={"name": "adamw8bit"},
    )
    command = [sys.executable, "-m", "lora_diffusion", "train", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "test.safetensors").is_file()


@pytest.fixture(scope="module")
def finished(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run; its folder is `run` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(
        folder / "run.toml",
        tiny_sd1,
        draw_pictures(folder / "pictures"),
        run={"steps": STEPS, "save_every": 3, "save_precision": "fp32"},
        preview={"every": 3, "prompts": PROMPTS, "steps": 4, "cfg": 4.0},
        validation={"every": 2, "fraction": 0.2},
        optimizer={"lr": 1e-2},
    )
    _train(config)
    return config


def test_run_folder_holds_everything_that_is_promised(finished: Path) -> None:
    run = finished.parent / "run"
    for name in ("config.toml", "dataset.json", "log.txt", "README.md", "loss.png", "contact-sheet.png"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(path.name for path in run.glob("*.safetensors")) == ["test-000003.safetensors", "test.safetensors"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000003", "000006"]
    steps_and_prompts = [f"{step:06d}-{index}.png" for step in (0, 3, 6) for index in (0, 1)]
    assert sorted(path.name for path in (run / "previews").iterdir()) == steps_and_prompts
    state = RunFolder(run).read_state()
    assert state is not None
    assert (state.status, state.step, state.steps) == ("finished", STEPS, STEPS)


def test_log_says_what_was_found_among_the_pictures(finished: Path) -> None:
    log = (finished.parent / "run" / "log.txt").read_text(encoding="utf-8")
    told = "Data set: 10 pictures. Files left out: 0, without a caption: 0, captions cut at 75 tokens: 0. See "
    assert f"{told}{finished.parent / 'run' / 'dataset.json'}." in log


def test_metrics_have_a_line_per_step_and_the_validation_loss_where_measured(finished: Path) -> None:
    lines = read_metrics(finished.parent / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6]
    for line in lines:
        assert {"segment", "epoch", "loss", "lr", "grad_norm", "seconds"} <= line.keys()
    assert lines[-1]["epoch"] == pytest.approx(6 / 4, abs=1e-3)  # 8 of 10 pictures in two buckets: 4 batches of 2


def test_last_preview_is_what_generate_draws_with_the_file(tiny_sd1: Path, finished: Path, tmp_path: Path) -> None:
    run = finished.parent / "run"
    parts = [f"--adapter={run / 'test.safetensors'}:{strength}" for strength in (0.75, 0.25)]  # 1 together
    arguments = ["--base", str(tiny_sd1), *parts, "--prompt", PROMPTS[0]]
    options = ["--seed", "7", "--steps", "4", "--cfg", "4", "--out", str(tmp_path), "--precision", "fp32"]
    result = CliRunner().invoke(app, ["generate", *arguments, *options])
    assert result.exit_code == 0, result.output
    drawn = np.asarray(Image.open(next(tmp_path.glob("*.png"))), float)
    preview = np.asarray(Image.open(run / "previews" / "000006-0.png"), float)
    start = np.asarray(Image.open(run / "previews" / "000000-0.png"), float)
    assert np.abs(drawn - preview).max() <= 1  # a batch of one and a batch of two round differently
    assert np.abs(start - preview).max() > 2, "the adapter changed the picture"


def test_preview_says_how_it_was_drawn(finished: Path) -> None:
    parameters = read_png(finished.parent / "run" / "previews" / "000003-1.png")
    assert parameters.request.prompt == PROMPTS[1]
    assert (parameters.request.seed, parameters.request.steps, parameters.request.cfg) == (8, 4, 4.0)


def test_adapter_file_has_alpha_metadata_and_no_private_path(finished: Path) -> None:
    path = finished.parent / "run" / "test.safetensors"
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    modules = {name.partition(".")[0] for name in names}
    assert len(modules) > 0
    assert all(f"{module}.alpha" in names for module in modules)
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_steps"] == str(STEPS)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert str(finished.parent) not in json.dumps(metadata)
    assert str(Path.home()) not in json.dumps(metadata)


def test_training_the_saved_config_again_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    run = finished.parent / "run"
    again = prepare(run / "config.toml", f"run.output={json.dumps(str(tmp_path / 'again'))}").fit()
    assert tensor_hash(again) == tensor_hash(run / "test.safetensors")


def test_previews_and_validation_do_not_change_what_is_learned(tiny_sd1: Path, finished: Path, tmp_path: Path) -> None:
    run = finished.parent / "run"
    overrides = [f"run.output={json.dumps(str(tmp_path / 'quiet'))}", "preview.prompts=[]", "run.save_every=0"]
    assert tensor_hash(prepare(run / "config.toml", *overrides).fit()) == tensor_hash(run / "test.safetensors")


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    adapter = finished.parent / "run" / "test.safetensors"
    before = tensor_hash(adapter)
    _train(finished, "--resume")
    assert tensor_hash(adapter) == before


def test_resume_continues_to_a_later_last_step(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    output = f"run.output={json.dumps(str(tmp_path / 'run'))}"
    _train(finished, "--resume", "--set", output, "--set", "run.steps=8")
    state = RunFolder(tmp_path / "run").read_state()
    assert state is not None
    assert (state.status, state.step) == ("finished", 8)
    assert {line["segment"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {0, 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [("adapter.rank=8", "rank"), ("run.seed=4", "seed"), ("run.batch_size=1", "batch_size")],
)
def test_resume_with_another_config_is_refused_with_the_difference(finished: Path, change: str, expected: str) -> None:
    result = CliRunner().invoke(app, ["train", "--config", str(finished), "--resume", "--set", change])
    assert result.exit_code == 2
    assert expected in result.output
    assert "→" in result.output


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_resume_wants_the_same_base_wherever_it_lies(finished: Path, tmp_path: Path, part: str) -> None:
    moved = tmp_path / "base"
    shutil.copytree(TrainConfig.load(finished).model.path, moved)
    override = f"model.path={json.dumps(str(moved))}"
    assert prepare(finished, override, resume=True).step == STEPS

    weights = next((moved / part).glob("*.safetensors"))
    save_file({name: tensor * 1.3 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=f"model.path: its {part} changed"):
        prepare(finished, override, resume=True)


def test_a_resume_to_an_end_that_is_over_is_refused_and_changes_nothing(finished: Path) -> None:
    run = RunFolder(finished.parent / "run")
    paths = [run.config, run.state_file, run.adapter("test"), run.metrics]
    before = [path.read_bytes() for path in paths]
    result = CliRunner().invoke(app, ["train", "--config", str(finished), "--resume", "--set", "run.steps=5"])
    assert result.exit_code == 2
    assert "at step 6 already" in " ".join(result.output.split())
    assert [path.read_bytes() for path in paths] == before


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(finished: Path, tmp_path: Path) -> None:
    trainer = prepare(finished, resume=True)
    known = trainer.facts["config"]
    earlier = known | {
        "adapter": {key: value for key, value in known["adapter"].items() if key != "rslora"},
        "model": {key: value for key, value in known["model"].items() if key not in ("compile", "merge")},
    }
    without_base = {key: value for key, value in trainer.facts.items() if key != "base"}
    trainer.run = RunFolder(tmp_path / "run")
    trainer.facts = without_base | {"config": earlier}
    save_checkpoint(trainer.run.checkpoints, trainer.checkpoint(), keep=2)
    output = f"run.output={json.dumps(str(tmp_path / 'run'))}"
    assert prepare(finished, output, resume=True).step == STEPS
    with pytest.raises(UserError, match="rslora: False → True"):
        prepare(finished, output, "adapter.rslora=true", resume=True)


def test_a_resume_that_holds_no_more_pictures_back_says_which_setting_does_it(finished: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.every: 2 → 0"):
        prepare(finished, "validation.every=0", resume=True)
    assert prepare(finished, "validation.every=3", resume=True).step == STEPS


def test_second_start_moves_the_finished_run_aside(tiny_sd1: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"), run={"steps": 3})
    _train(config)
    first = tensor_hash(tmp_path / "run" / "test.safetensors")
    _train(config, "--set", "run.seed=99")
    assert "moved to" in (tmp_path / "run" / "log.txt").read_text()
    assert tensor_hash(tmp_path / "run-previous-1" / "test.safetensors") == first
    assert tensor_hash(tmp_path / "run" / "test.safetensors") != first


def test_resume_without_a_checkpoint_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    result = CliRunner().invoke(app, ["train", "--config", str(config), "--resume"])
    assert result.exit_code == 2
    assert "--resume" in result.output


def test_text_encoder_is_trained_at_its_own_rate(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    files = {}
    for rate in (1e-9, 1e-2):
        config = write_config(
            tmp_path / f"{rate}.toml", tiny_sd1, pictures, adapter={"text_encoder": True},
            optimizer={"lr": 1e-3, "text_encoder_lr": rate}, run={"output": str(tmp_path / str(rate))},
        )  # fmt: skip
        files[rate] = load_file(prepare(config).fit())
    ups = [name for name in files[1e-2] if name.startswith("lora_te_text_model_") and "lora_up" in name]
    assert len(ups) > 0
    assert all(files[1e-2][name].abs().max() > 0 for name in ups)
    assert all(files[1e-9][name].abs().max() < 1e-7 for name in ups)  # six Adam steps of the rate at most
    assert any(t.abs().max() > 1e-4 for n, t in files[1e-9].items() if n.startswith("lora_unet_") and "lora_up" in n)


def _trained(tiny_sd1: Path, folder: Path, name: str, **sections) -> dict[str, torch.Tensor]:
    run = {"output": str(folder / name), "save_precision": "fp32"} | sections.pop("run", {})
    config = write_config(folder / f"{name}.toml", tiny_sd1, draw_pictures(folder / "pictures"), run=run, **sections)
    return load_file(prepare(config).fit())


def test_gradient_checkpointing_learns_the_same(tiny_sd1: Path, tmp_path: Path) -> None:
    plain = _trained(tiny_sd1, tmp_path, "plain")
    checkpointed = _trained(tiny_sd1, tmp_path, "checkpointed", model={"gradient_checkpointing": True})
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-6, rtol=0)  # the same sums, computed twice


def test_bfloat16_base_learns_about_the_same(tiny_sd1: Path, tmp_path: Path) -> None:
    exact = _trained(tiny_sd1, tmp_path, "fp32")
    rounded = _trained(tiny_sd1, tmp_path, "bf16", run={"precision": "bf16"})
    a, b = (torch.cat([t.flatten() for n, t in sorted(f.items()) if "lora_up" in n]) for f in (exact, rounded))
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    # Adam's first steps have the size of the learning rate whatever the gradient's; rounding flips some signs.
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.8


def test_velocity_prediction_trains(tmp_path: Path) -> None:
    from tests.tiny import make_tiny_sd1

    base = make_tiny_sd1(tmp_path / "v", prediction="v")
    config = write_config(tmp_path / "run.toml", base, draw_pictures(tmp_path / "pictures"))
    trainer = prepare(config)
    assert trainer.loss.model.schedule.prediction == "v"
    trainer.fit()
    assert trainer.step == 6


def test_check_reports_counts_and_findings(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    (pictures / "03.txt").unlink()
    (pictures / "04.txt").write_text("cat " * 200)
    (pictures / "copy.png").write_bytes((pictures / "05.png").read_bytes())
    (pictures / "copy.txt").write_text("a cat")
    (pictures / "broken.png").write_bytes(b"")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"steps": 60, "gradient_accumulation": 2})
    result = CliRunner().invoke(app, ["check", "--config", str(config), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["images"] == 11
    assert report["images_left_out"] == 1
    assert report["captions_missing"] == 1
    assert report["captions_cut"] == 1
    assert sum(report["buckets"].values()) == 11
    assert report["effective_batch_size"] == 4
    assert report["steps"] == 60
    assert report["epochs"] == pytest.approx(60 / report["steps_per_epoch"])
    assert report["seconds_per_step"] > 0
    findings = json.dumps(report["findings"])
    for name in ("03.png", "04.png", "copy.png", "broken.png"):
        assert name in findings
    assert not (tmp_path / "run").exists(), "check writes nothing"
    readable = CliRunner().invoke(app, ["check", "--config", str(config)])
    assert readable.exit_code == 0
    assert "11 used, 1 left out" in readable.output
