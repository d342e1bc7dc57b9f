from __future__ import annotations

import pytest
import torch

from lora_diffusion.diffusion.schedule import (
    NoiseSchedule,
    Prediction,
    make_betas,
    sample_timestep,
    to_zero_terminal_snr,
)
from lora_diffusion.errors import UserError
from lora_diffusion.streams import stream


def sd_schedule(prediction: str = "epsilon", zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule.from_betas(make_betas("scaled_linear"), prediction, zero_terminal_snr)  # type: ignore[arg-type]


def draw(name: str, batch: int = 4) -> torch.Tensor:
    return torch.randn((batch, 4, 8, 8), generator=stream(0, name))


T = torch.tensor([0, 147, 500, 999])


def test_stable_diffusions_schedule_has_the_known_values() -> None:
    """Measured on the noise scheduler of kohya-ss/sd-scripts."""
    schedule = sd_schedule()
    assert schedule.num_steps == 1000
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-5)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.00466, abs=1e-5)
    snr = schedule.snr(torch.arange(1000))
    assert snr[0] == pytest.approx(1175.5, rel=1e-3)
    assert snr[100] == pytest.approx(8.45, abs=5e-3)
    assert snr[500] == pytest.approx(0.382, abs=5e-4)
    assert int((snr < 5).nonzero()[0]) == 147


def test_zero_terminal_snr_has_the_known_values() -> None:
    alphas = sd_schedule(zero_terminal_snr=True).alphas_cumprod
    assert alphas[999] == 0
    assert alphas[0] == pytest.approx(0.99915, abs=1e-5)
    assert alphas[500] == pytest.approx(0.2410, abs=1e-4)
    assert alphas[900] == pytest.approx(0.00296, abs=1e-5)
    assert (alphas.diff() < 0).all()


def test_at_zero_terminal_snr_only_noise_is_left() -> None:
    schedule = sd_schedule("v", zero_terminal_snr=True)
    last = torch.full((4,), 999)
    assert torch.equal(schedule.add_noise(draw("latents"), draw("noise"), last), draw("noise"))
    assert torch.equal(schedule.target(draw("latents"), draw("noise"), last), -draw("latents"))
    assert not schedule.snr(last).any()


def test_rescaling_twice_changes_nothing_more() -> None:
    once = sd_schedule(zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(to_zero_terminal_snr(once), once)


def test_noisy_latents_of_unit_variance_have_unit_variance() -> None:
    latents, noise = draw("latents", 256), draw("noise", 256)
    for t in (0, 300, 999):
        noisy = sd_schedule().add_noise(latents, noise, torch.full((256,), t))
        assert noisy.var() == pytest.approx(1.0, abs=0.03)  # 65,536 numbers: standard error 0.006


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_latents_and_noise_can_be_recovered_from_the_target(prediction: str) -> None:
    schedule = sd_schedule(prediction)
    latents, noise = draw("latents"), draw("noise")
    noisy, target = schedule.add_noise(latents, noise, T), schedule.target(latents, noise, T)
    alpha = schedule.alphas_cumprod[T].reshape(-1, 1, 1, 1)
    if prediction == "epsilon":
        assert torch.equal(target, noise)
    else:
        torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * target, latents)
        torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * target, noise)


def test_each_sample_has_its_own_timestep() -> None:
    schedule = sd_schedule("v")
    latents, noise = draw("latents"), draw("noise")
    together = schedule.add_noise(latents, noise, T), schedule.target(latents, noise, T)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.equal(schedule.add_noise(latents[one], noise[one], T[one]), together[0][one])
        assert torch.equal(schedule.target(latents[one], noise[one], T[one]), together[1][one])


def test_half_precision_latents_keep_their_dtype_and_are_computed_in_float32() -> None:
    schedule = sd_schedule("v")
    latents, noise = draw("latents").bfloat16(), draw("noise").bfloat16()
    exact = schedule.add_noise(latents.float(), noise.float(), T)
    assert torch.equal(schedule.add_noise(latents, noise, T), exact.bfloat16())
    assert schedule.target(latents, noise, T).dtype == torch.bfloat16
    assert schedule.snr(T).dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_rise_within_zero_and_one(kind: str) -> None:
    betas = make_betas(kind, num_steps=50)
    assert betas.shape == (50,)
    assert betas.dtype == torch.float32
    assert betas.min() > 0 and betas.max() < 1
    assert (betas.diff() >= 0).all()


def test_an_unknown_beta_schedule_is_named() -> None:
    with pytest.raises(UserError, match="'sigmoid' is not one of linear, scaled_linear, squaredcos_cap_v2"):
        make_betas("sigmoid")


def test_timesteps_are_uniform_in_a_half_open_range() -> None:
    drawn = torch.tensor([sample_timestep(stream(0, "t", i), 100, 110) for i in range(2000)])
    counts = torch.bincount(drawn - 100, minlength=10)
    assert len(counts) == 10
    assert ((counts - 200).square() / 200).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_a_timestep_range_of_one_is_that_timestep() -> None:
    assert sample_timestep(stream(0, "t"), 999, 1000) == 999


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_estimate_of_clean_latents_undoes_the_target(prediction: Prediction) -> None:
    schedule = NoiseSchedule.from_betas(make_betas("scaled_linear"), prediction)
    latents, noise = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(latents, noise, t)
    # at t = 999 the signal is 0.07, which makes float32 rounding 15 times as large
    torch.testing.assert_close(
        schedule.estimate(noisy, schedule.target(latents, noise, t), t), latents, atol=1e-4, rtol=0
    )
