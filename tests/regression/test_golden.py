"""Pictures and training on the sample base are those that were looked at and committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samples.make_golden import GOLDEN, LOSS_STEPS, REQUESTS, draw_golden, train_golden

# Pictures of one machine on 1 and on 2 threads are equal or differ by 1 of 255; other processors sum in other orders,
# which 25 steps of denoising carry on. A wrong sampler, scale or adapter differs by tens.
PIXEL_TOLERANCE = 4
MEAN_TOLERANCE = 0.5
# float32 sums in another order, carried through 50 Adam steps.
LOSS_TOLERANCE = 2e-3


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pictures_equal_the_golden_ones_on_any_number_of_threads(threads: int) -> None:
    assert len(REQUESTS) == 6
    for name, picture in draw_golden().items():
        with Image.open(GOLDEN / f"{name}.png") as golden:
            difference = np.abs(np.asarray(picture, float) - np.asarray(golden.convert("RGB"), float))
        assert difference.max() <= PIXEL_TOLERANCE, f"{name} on {threads} threads: {difference.max()}"
        assert difference.mean() <= MEAN_TOLERANCE, f"{name} on {threads} threads: {difference.mean()}"


def test_golden_pictures_differ_from_each_other() -> None:
    """Else the comparison above would pass for an engine that ignores adapters or samplers."""
    pictures = [np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB"), float) for name in REQUESTS]
    for index, picture in enumerate(pictures):
        for other in pictures[index + 1 :]:
            assert np.abs(picture - other).mean() > 10 * MEAN_TOLERANCE


def test_loss_curve_equals_the_golden_one(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "losses.json").read_text())
    assert len(golden) == LOSS_STEPS
    losses = train_golden(tmp_path)
    np.testing.assert_allclose(losses, golden, rtol=LOSS_TOLERANCE)
    assert np.mean(golden[-10:]) < np.mean(golden[:10]), "fifty steps lower the loss"
