from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from lora_diffusion.generation.plots import RUNS, SMOOTH, VALIDATION, loss_plot, losses_plot, series, smooth

METRICS = [{"step": step, "loss": 0.1 + 0.1 / step, "lr": 1e-4} for step in range(1, 51)]


def num_pixels(path: Path, color: str) -> int:
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == ImageColor.getrgb(color)).all(-1).sum())


def test_the_plot_is_900_px_wide_and_shows_validation_only_where_measured(tmp_path: Path) -> None:
    loss_plot(METRICS, tmp_path / "a.png", "ink")
    loss_plot([*METRICS, {"step": 25, "val_loss": 0.12}, {"step": 50, "val_loss": 0.11}], tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 900
    assert num_pixels(tmp_path / "a.png", SMOOTH) > 300
    assert num_pixels(tmp_path / "a.png", VALIDATION) == 0
    assert num_pixels(tmp_path / "b.png", VALIDATION) > 50


def test_one_step_and_missing_learning_rates_are_drawn(tmp_path: Path) -> None:
    loss_plot([{"step": 1, "loss": 0.5}], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_values_that_are_not_finite_are_left_out() -> None:
    lines = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5}, {"step": 3, "val_loss": 1.0}]
    assert series(lines, "loss") == ([2], [0.5])


def test_no_loss_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no line"):
        loss_plot([{"step": 1, "val_loss": 0.1}], tmp_path / "a.png")


def test_several_runs_get_a_colour_each_and_their_names_beside_the_plot(tmp_path: Path) -> None:
    lower = [line | {"loss": line["loss"] / 2} for line in METRICS]
    losses_plot({"rank 8": METRICS, "rank 16": lower, "failed": []}, tmp_path / "a.png", "ink")
    losses_plot({f"seed {n}": METRICS[:1] for n in range(30)}, tmp_path / "many.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 900
    assert min(num_pixels(tmp_path / "a.png", colour) for colour in RUNS[:2]) > 300
    assert num_pixels(tmp_path / "a.png", RUNS[3]) == 0
    with pytest.raises(ValueError, match="no line"):
        losses_plot({"rank 8": [{"step": 1, "val_loss": 0.1}]}, tmp_path / "b.png")


def test_smoothing_keeps_a_constant_and_halves_a_jump_after_its_half_life() -> None:
    assert smooth([3.0] * 20, 5) == pytest.approx([3.0] * 20)
    jump = smooth([0.0] * 1000 + [1.0] * 10, 10)
    assert jump[-1] == pytest.approx(0.5, abs=1e-6)


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import lora_diffusion.generation.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
