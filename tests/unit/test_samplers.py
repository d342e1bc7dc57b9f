from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_diffusion.diffusion.schedule import NoiseSchedule, make_betas
from lora_diffusion.errors import UserError
from lora_diffusion.generation.samplers import SAMPLERS, build_scheduler, sampler_named, takes_generator
from lora_diffusion.models.schedules import ScheduleEvidence, resolve_scheduler, schedule_of

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
}
CPU = torch.device("cpu")
ZERO_SNR = ("ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "unipc")


def schedule(prediction: str = "epsilon", zero_terminal_snr: bool = False) -> NoiseSchedule:
    assert prediction in ("epsilon", "v")
    return NoiseSchedule.from_betas(make_betas("scaled_linear"), prediction, zero_terminal_snr)


def draw(
    name: str, noise_schedule: NoiseSchedule, clean: Tensor, steps: int, config: Mapping[str, Any] = CONFIG
) -> Tensor:
    """What a sampler makes with a perfect model of one single picture, `clean`."""
    scheduler = build_scheduler(name, config, noise_schedule, steps, CPU)
    generator = torch.Generator().manual_seed(0)
    extra = {"generator": generator} if takes_generator(scheduler) else {}
    latents = torch.randn(clean.shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        alpha = _alpha_bar(noise_schedule, float(t))
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        if noise_schedule.prediction == "v":
            noise = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        latents = scheduler.step(noise, t, latents, **extra, return_dict=False)[0]
    return latents


def _alpha_bar(noise_schedule: NoiseSchedule, t: float) -> Tensor:
    """ᾱ at a timestep; between two of them, σ is interpolated."""
    sigmas = ((1 - noise_schedule.alphas_cumprod) / noise_schedule.alphas_cumprod).sqrt()
    low = int(t)
    sigma = torch.lerp(sigmas[low], sigmas[min(low + 1, 999)], t - low) if t != low else sigmas[low]
    return torch.tensor(0.0) if sigma.isinf() else 1 / (sigma**2 + 1)


def test_the_names_users_know_are_there() -> None:
    assert set(SAMPLERS) >= {"ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "unipc", "heun", "lms"}
    assert len({(sampler.label, sampler.schedule_type) for sampler in SAMPLERS.values()}) == len(SAMPLERS)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_model_of_one_picture_gives_that_picture(name: str, prediction: str) -> None:
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = draw(name, schedule(prediction), clean, 25)
    # DDIM ends at the noise of timestep 0 (set_alpha_to_one False), whose sigma is 0.03; the others end at 0.
    assert (drawn - clean).std() < 0.05


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ZERO_SNR)
def test_with_zero_terminal_snr_drawing_starts_at_the_last_step_and_succeeds(name: str, steps: int) -> None:
    noise_schedule = schedule("v", zero_terminal_snr=True)
    scheduler = build_scheduler(name, CONFIG, noise_schedule, steps, CPU)
    assert float(scheduler.timesteps[0]) == 999
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (draw(name, noise_schedule, clean, steps) - clean).std() < 0.1


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - set(ZERO_SNR)))
def test_a_sampler_that_cannot_start_from_pure_noise_says_which_can(name: str) -> None:
    with pytest.raises(UserError, match=r"zero terminal SNR.*ddim, euler"):
        build_scheduler(name, CONFIG, schedule("v", zero_terminal_snr=True), 10, CPU)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_schedule_decides_the_prediction_type_not_the_file(name: str) -> None:
    scheduler = build_scheduler(name, CONFIG, schedule("v"), 5, CPU)
    assert scheduler.config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 61, 998])  # 998: the most that `Engine` takes
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"dpm++2m-karras"}))  # which has no spacing
def test_any_number_of_steps_visits_as_many_timesteps(name: str, steps: int, spacing: str) -> None:
    scheduler: Any = build_scheduler(name, CONFIG | {"timestep_spacing": spacing}, schedule(), steps, CPU)
    timesteps = scheduler.timesteps
    assert len(timesteps) == (2 * steps - 1 if name == "heun" else steps)
    assert len(timesteps.unique()) == steps
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    if name != "ddim":
        assert len(scheduler.sigmas) == len(timesteps) + 1
        assert len(scheduler.sigmas.unique()) == steps + 1
        assert scheduler.sigmas[-1] == 0


# What the file of another sampler, or of old, says and leaves out


@pytest.mark.parametrize("said", [{}, {"clip_sample": True}, {"thresholding": True}])
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_not_clipped_whatever_the_file_says(name: str, said: dict[str, Any]) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "clip_sample"} | said
    clean = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (draw(name, schedule(), clean, 25, config) - clean).std() < 0.05  # as above


@pytest.mark.parametrize("said", [{}, {"steps_offset": 0}])
def test_ddim_ends_at_the_step_after_the_first_whatever_the_file_says(said: dict[str, Any]) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "steps_offset"} | said
    assert build_scheduler("ddim", config, schedule(), 25, CPU).timesteps.tolist() == [*range(961, 0, -40)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_the_file_names_no_betas_drawing_has_the_noise_of_training(name: str) -> None:
    config = resolve_scheduler({}, ScheduleEvidence())
    noise_schedule = schedule_of(config)
    scheduler: Any = build_scheduler(name, config, noise_schedule, 5, CPU)
    assert torch.equal(scheduler.alphas_cumprod, noise_schedule.alphas_cumprod)
    assert torch.equal(noise_schedule.alphas_cumprod, schedule().alphas_cumprod)


@pytest.mark.parametrize(
    "said",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True, "use_lu_lambdas": True, "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        {"predict_x0": False, "solver_type": "bh1", "interpolation_type": "log_linear", "timestep_type": "continuous"},
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_name_alone_decides_the_sampler_not_the_one_the_file_was_saved_with(
    name: str, said: dict[str, Any]
) -> None:
    told = build_scheduler(name, CONFIG | said, schedule(), 5, CPU)
    silent = build_scheduler(name, CONFIG, schedule(), 5, CPU)
    takes = inspect.signature(type(told).__init__).parameters
    assert {key: told.config.get(key) for key in takes} == {key: silent.config.get(key) for key in takes}
    assert torch.equal(told.timesteps, silent.timesteps)


def test_an_unknown_sampler_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'Euler-A'.*mean 'euler-a'"):
        sampler_named("Euler-A")
    with pytest.raises(UserError, match="Known: ddim, euler"):
        sampler_named("")
