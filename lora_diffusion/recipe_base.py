"""From a config to its base: where and in which precision it is, loaded, and made ready to be trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from lora_diffusion.config import TrainConfig
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.checkpointing import checkpoint_blocks
from lora_diffusion.models.fused_layers import fuse_layers
from lora_diffusion.models.load import load_model
from lora_diffusion.models.on_cpu import suit_to_cpu
from lora_diffusion.models.precision import multiplies_bf16
from lora_diffusion.progress import Track, silent
from lora_diffusion.recipe_adapters import Adapters, inject_adapters, merge_into_base

logger = logging.getLogger(__name__)

_BF16_IS_FASTER = (
    'This processor has matrix units for bfloat16: with [run] precision = "bf16" a step takes about a third of the '
    'time. "auto" is fp32 on a CPU, which gives the same everywhere.'
)
_LARGE_UNET = 300_000_000  # parameters; in a small one what surrounds the products counts more


def load_base(config: TrainConfig, dtype: torch.dtype, device: torch.device, track: Track = silent) -> DiffusionModel:
    """The base that training sees: with the adapters of `model.merge` in its weights.

    The UNet comes to `device` with `prepare_model`, when what encodes pictures and captions may have left.
    """
    model = load_model(
        config.model.path,
        family=config.model.family,
        prediction=config.model.prediction,
        zero_terminal_snr=config.model.zero_terminal_snr,
        configs=config.model.configs,
        dtype=dtype,
        device=device,
        attention=config.model.attention,
        quantise=config.model.quantise,
        prepare=partial(merge_into_base, config) if config.model.merge else None,
        unet_waits=True,
        track=track,
    )
    model.check_clip_skip(config.model.clip_skip)
    is_large = sum(parameter.numel() for parameter in model.unet.parameters()) >= _LARGE_UNET
    if is_large and config.run.precision == "auto" and multiplies_bf16(device):
        logger.info(_BF16_IS_FASTER)
    return model


def release_unused(configs: Sequence[TrainConfig], model: DiffusionModel) -> None:
    """Free what the steps do without once all is cached. A picture asked for later loads it again, and keeps it.

    configs: of all trainings on this base. With preview prompts nothing is freed: it would be loaded again before the
    first step.
    """
    if any(config.preview.prompts for config in configs):
        return
    is_as_on_disk = not any(config.adapter.text_encoder or config.model.merge for config in configs)
    model.release(part for part in model.reloads if part == "vae" or is_as_on_disk)


def suit_to_device(model: DiffusionModel, num_pixels: int, track: Track = silent) -> None:
    """Bring the UNet into the form that its device computes fastest in; what it computes stays the same.

    num_pixels: of the latents that it sees at once.
    """
    device = next(model.unet.parameters()).device
    if device.type == "cuda":
        fuse_layers(model.unet)
        return
    suit_to_cpu(model.unet, num_pixels, track)


def prepare_model(
    config: TrainConfig,
    model: DiffusionModel,
    num_pixels: int,
    track: Track = silent,
    *,
    is_shared: bool = False,
    is_resumed: bool = False,
) -> Adapters:
    """From a base that has encoded what is cached to one that is trained; returns its adapters.

    num_pixels: of the latents that the UNet sees at once.
    """
    if not is_shared:
        release_unused([config], model)
    model.place_unet()
    suit_to_device(model, num_pixels, track)
    adapters = inject_adapters(config, model, is_resumed=is_resumed)
    if config.model.gradient_checkpointing:
        checkpoint_blocks(model.unet, only_outer=config.model.gradient_checkpointing == "outer")
    return adapters
