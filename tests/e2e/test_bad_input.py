"""What goes wrong before training is one message that names the place, and exit status 2."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_diffusion.cli import app
from tests.training_runs import draw_pictures, write_config

Edit = Callable[[Path, Path], dict[str, dict[str, object]]]


def _wrong_family(folder: Path, base: Path) -> dict[str, dict[str, object]]:
    copy = folder / "sdxl"
    copy.mkdir()
    for source in base.rglob("*"):
        target = copy / source.relative_to(base)
        target.mkdir() if source.is_dir() else target.write_bytes(source.read_bytes())
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(
        json.dumps(config | {"cross_attention_dim": 1280, "addition_embed_type": "text_time"})
    )
    return {"model": {"path": str(copy)}}


def _pickle_checkpoint(folder: Path, _base: Path) -> dict[str, dict[str, object]]:
    (folder / "model.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    return {"model": {"path": str(folder / "model.ckpt")}}


def _empty_folder(folder: Path, _base: Path) -> dict[str, dict[str, object]]:
    (folder / "nothing").mkdir()
    return {"dataset": {"path": str(folder / "nothing")}}


def _output_is_a_file(folder: Path, _base: Path) -> dict[str, dict[str, object]]:
    (folder / "taken").write_text("a file")
    return {"run": {"output": str(folder / "taken")}}


CASES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "misspelt key": (lambda f, b: {"optimizer": {"learning_rat": 1.0}}, ("learning_rat", "lr")),
    "wrong type": (lambda f, b: {"adapter": {"rank": "big"}}, ("rank", "big")),
    "two errors": (lambda f, b: {"adapter": {"rank": 0}, "run": {"steps": -1}}, ("rank", "steps")),
    "missing data folder": (lambda f, b: {"dataset": {"path": str(f / "absent")}}, ("absent", "does not exist")),
    "empty data folder": (_empty_folder, ("nothing",)),
    "missing base": (lambda f, b: {"model": {"path": str(f / "no-model")}}, ("no-model",)),
    "wrong family": (_wrong_family, ("1280", "the SDXL refiner")),
    "pickle checkpoint": (_pickle_checkpoint, ("model.ckpt", "pickle")),
    "output is a file": (_output_is_a_file, ("taken",)),
    "fp16 on a CPU": (lambda f, b: {"run": {"precision": "fp16"}}, ("fp16", "bf16")),
    "pattern that matches nothing": (lambda f, b: {"adapter": {"targets": ["attn9"]}}, ("attn9",)),
    "resolution that does not fit": (lambda f, b: {"dataset": {"bucket_step": 3}}, ("bucket_step",)),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_told_before_training(tiny_sd1: Path, tmp_path: Path, case: str) -> None:
    edit, expected = CASES[case]
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, **edit(tmp_path, tiny_sd1))
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for text in expected:
        assert text in result.output
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write to")
def test_unwritable_output_is_told_before_training(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"output": "/proc/self/run"})
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 2, result.output
    assert "/proc/self/run cannot be written" in result.output


def test_unreadable_picture_is_skipped_and_named(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    (pictures / "broken.png").write_bytes(b"<html>not found</html>")
    (pictures / "00.txt").unlink()
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"steps": 3})
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert [Path(entry["file"]).name for entry in report["left_out"]] == ["broken.png"]
    assert [Path(note["file"]).name for note in report["notes"] if "caption" in note["message"]] == ["00.png"]
    assert report["summary"]["images"] == 10
