"""Samplers by the names people know. The arithmetic is diffusers'; here is only which class and which options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch

    from lora_diffusion.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler class with its options, and what A1111 calls it in a picture's parameters."""

    label: str
    scheduler: str
    schedule_type: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIM", "DDIMScheduler"),
    "euler": Sampler("Euler", "EulerDiscreteScheduler"),
    "euler-a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpm++2m": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpm++2m-karras": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", "Karras", {"use_karras_sigmas": True}),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler"),
    "heun": Sampler("Heun", "HeunDiscreteScheduler"),
    "lms": Sampler("LMS", "LMSDiscreteScheduler"),
}

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}

_OF_THE_MODEL = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"),
    *("set_alpha_to_one", "timestep_spacing"),
)
"""What a scheduler_config.json says of the model. All else is of the sampler that it was saved with."""

_FOR_LATENTS = {"clip_sample": False, "steps_offset": 1}
"""Whatever the model's file says: latents are not bound to ±1, and Stable Diffusion's steps start at 1.

Old files and those of another sampler say otherwise or nothing; diffusers' StableDiffusionPipeline corrects them, too.
"""


class Scheduler(Protocol):
    """What we use of a diffusers scheduler. One instance draws one batch: it counts its steps."""

    timesteps: torch.Tensor
    init_noise_sigma: Any
    config: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor: ...
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any: ...


def sampler_named(name: str) -> Sampler:
    """Raises UserError that names the nearest known sampler."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    near = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(f"Unknown sampler {name!r}. {hint}Known: {', '.join(SAMPLERS)}.")


def build_scheduler(
    name: str, model_config: Mapping[str, Any], schedule: NoiseSchedule, steps: int, device: torch.device
) -> Scheduler:
    """A fresh scheduler with `steps` steps, for a model's `scheduler_config.json` and its noise schedule.

    The model's file decides betas and spacing, `name` alone the sampler; `schedule` decides the prediction type and
    zero terminal SNR, where the last training step must be visited: trailing spacing (Lin et al. 2023,
    arXiv:2305.08891, section 3.3). Raises UserError for an unknown sampler and for one that cannot start from pure
    noise.
    """
    import diffusers

    from lora_diffusion.models.libraries import without_extras

    sampler = sampler_named(name)
    scheduler_class = getattr(diffusers, sampler.scheduler)
    options = {**_FOR_LATENTS, **sampler.options, "prediction_type": _PREDICTION_TYPES[schedule.prediction]}
    if has_zero_terminal_snr(schedule):
        if not _can_start_from_pure_noise(scheduler_class):
            able = [key for key, s in SAMPLERS.items() if _can_start_from_pure_noise(getattr(diffusers, s.scheduler))]
            raise UserError(
                f"Sampler {name!r} cannot draw with a model of zero terminal SNR. Use one of: {', '.join(able)}."
            )
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    of_the_model = {key: model_config[key] for key in _OF_THE_MODEL if key in model_config}
    with without_extras():  # it imports every scheduler that could take its place
        scheduler = scheduler_class.from_config(of_the_model, **options)
    scheduler.set_timesteps(steps, device=device)
    _end_at_zero(scheduler)
    if hasattr(scheduler, "set_begin_index"):  # else it looks for its first timestep, and may take one that is equal
        scheduler.set_begin_index(0)
    return scheduler


def has_zero_terminal_snr(schedule: NoiseSchedule) -> bool:
    """Whether the last training step holds no signal at all."""
    return float(schedule.alphas_cumprod[-1]) < 1e-6  # diffusers' Euler replaces the exact 0 by 2^-24


def takes_generator(scheduler: Scheduler) -> bool:
    """Whether `step` can draw noise, and so must be given each picture's generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


def _end_at_zero(scheduler: Any) -> None:
    """Take off the timestep -1 that trailing spacing in diffusers adds for some numbers of steps, as 61 and 103.

    It counts down from 1000 by 1000 / steps, and after the last of them rounding can leave a little more than 0.
    """
    import torch

    is_real = scheduler.timesteps >= 0
    num_unreal = int((~is_real).sum())  # Heun has each twice
    if num_unreal:
        scheduler.timesteps = scheduler.timesteps[is_real]
        if hasattr(scheduler, "sigmas"):  # DDIM has none; the others' end with the 0 after the last step
            scheduler.sigmas = torch.cat([scheduler.sigmas[: -1 - num_unreal], scheduler.sigmas[-1:]])


def _can_start_from_pure_noise(scheduler_class: type) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(scheduler_class.__init__).parameters
