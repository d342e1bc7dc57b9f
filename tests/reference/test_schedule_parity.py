"""Our schedule against diffusers' own, which trained and samples the models."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr

from lora_diffusion.diffusion.schedule import NoiseSchedule, make_betas
from lora_diffusion.streams import stream

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
T = torch.tensor([0, 1, 147, 500, 998, 999])


def make_pair(kind: str, zero_terminal_snr: bool = False) -> tuple[NoiseSchedule, DDPMScheduler]:
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=zero_terminal_snr
    )
    return NoiseSchedule.from_betas(make_betas(kind), "v", zero_terminal_snr), theirs


def draw(name: str) -> torch.Tensor:
    return torch.randn((len(T), 4, 8, 8), generator=stream(0, name))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_alphas_are_bit_for_bit_those_of_diffusers(kind: str) -> None:
    ours, theirs = make_pair(kind)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_zero_terminal_snr_agrees(kind: str) -> None:
    ours, theirs = make_pair(kind, zero_terminal_snr=True)
    # theirs goes back to betas and multiplies them up again: a thousand float32 roundings
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noisy_latents_and_velocity_agree(zero_terminal_snr: bool) -> None:
    ours, theirs = make_pair("scaled_linear", zero_terminal_snr)
    latents, noise = draw("latents"), draw("noise")
    # without the rescaling the alphas are equal and only the order of roundings could differ
    atol = 3e-4 if zero_terminal_snr else 1e-6
    torch.testing.assert_close(
        ours.add_noise(latents, noise, T), theirs.add_noise(latents, noise, T), rtol=0, atol=atol
    )
    torch.testing.assert_close(
        ours.target(latents, noise, T), theirs.get_velocity(latents, noise, T), rtol=0, atol=atol
    )


def test_snr_agrees() -> None:
    ours, theirs = make_pair("scaled_linear")
    t = torch.arange(1000)
    torch.testing.assert_close(ours.snr(t), compute_snr(theirs, t), rtol=1e-5, atol=0)
