"""Our samplers against diffusers' own, with the scheduler configs that the models were published with."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lora_diffusion.generation.samplers import SAMPLERS, build_scheduler, takes_generator
from lora_diffusion.models.builtin_configs import builtin_configs
from lora_diffusion.models.schedules import ScheduleEvidence, evidence_of_scheduler, resolve_scheduler, schedule_of

COMMON: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5": ("sd1", {"_class_name": "PNDMScheduler"}),
    "stable-diffusion-2-1-base": ("sd2", {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}),
    "stable-diffusion-2-1": ("sd2", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    "stable-diffusion-xl-base-1.0": (
        "sdxl",
        {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
    ),
}
"""Model → its family and scheduler_config.json, less `COMMON`."""


def drawn(scheduler: Any) -> Tensor:
    """Latents after every step, for a model that predicts the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    extra = {"generator": generator} if takes_generator(scheduler) else {}
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    prediction = torch.randn(latents.shape, generator=generator)
    steps: list[Tensor] = []
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(0.9 * prediction + 0.1 * noisy, t, latents, **extra, return_dict=False)[0]
        steps.append(latents)
    return torch.stack(steps)


@pytest.mark.parametrize("kind", ["folder", "single file"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_drawn_as_by_diffusers(model: str, name: str, kind: str) -> None:
    family, own = PUBLISHED[model]
    published = COMMON | own
    evidence = evidence_of_scheduler(published)
    if kind == "folder":
        config = resolve_scheduler(published, evidence)
    else:
        builtin = builtin_configs(family, own.get("prediction_type", "epsilon"))["scheduler"]
        config = resolve_scheduler(builtin, ScheduleEvidence(evidence.prediction))
    ours: Any = build_scheduler(name, config, schedule_of(config), 25, torch.device("cpu"))

    its_own = getattr(diffusers, own["_class_name"]).from_config(published)
    sampler = SAMPLERS[name]
    theirs = getattr(diffusers, sampler.scheduler).from_config(its_own.config, **sampler.options)
    theirs.set_timesteps(25)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(drawn(ours), drawn(theirs))
