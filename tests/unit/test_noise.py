from __future__ import annotations

import pytest
import torch

from lora_diffusion.diffusion.noise import draw_noise
from lora_diffusion.streams import stream

SHAPE = (4, 16, 24)


def test_without_offset_it_is_the_generators_normal_noise() -> None:
    assert torch.equal(draw_noise(SHAPE, stream(0, "n")), torch.randn(SHAPE, generator=stream(0, "n")))


def test_the_offset_is_one_number_per_channel_on_the_same_noise() -> None:
    shift = draw_noise(SHAPE, stream(0, "n"), offset=0.1) - draw_noise(SHAPE, stream(0, "n"))
    per_channel = shift.mean((1, 2), keepdim=True)
    torch.testing.assert_close(shift, per_channel.expand(SHAPE), rtol=0, atol=1e-6)  # float32 differences
    assert per_channel.unique().numel() == 4


def test_the_offset_scales_its_standard_deviation() -> None:
    means = [draw_noise(SHAPE, stream(i, "n"), offset=0.5) - draw_noise(SHAPE, stream(i, "n")) for i in range(500)]
    assert torch.stack(means)[:, :, 0, 0].std() == pytest.approx(0.5, abs=0.03)  # 2000 numbers: standard error 0.008


def test_noise_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    draw_noise(SHAPE, stream(0, "n"), 0.1)
    assert torch.equal(torch.get_rng_state(), before)
