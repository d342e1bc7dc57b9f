"""The model families this version trains, and how to tell which one a folder or file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.sd1 import SD1
from lora_diffusion.models.sd2 import SD2
from lora_diffusion.models.sdxl import SDXL

FAMILIES: dict[str, type[DiffusionModel]] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}

NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_REFINER_WIDTH = 1280  # the refiner sees one text encoder only, SDXL base both: 2048


@dataclass(frozen=True)
class Evidence:
    """What a base is, and the fact that shows it. family: a key of NAMES, or "" for anything else."""

    family: str
    fact: str


def family_of_config(pipeline_class: str, unet: Mapping[str, Any]) -> Evidence:
    """What a diffusers folder holds, from model_index.json's class and unet/config.json."""
    width = unet.get("cross_attention_dim")
    if "StableDiffusion3" in pipeline_class or "StableDiffusion" not in pipeline_class:
        return Evidence("", f"its pipeline is {pipeline_class}")
    if unet.get("in_channels", 4) != 4:
        return Evidence("", f"its UNet has {unet['in_channels']} input channels: an inpainting or editing model")
    if unet.get("addition_embed_type") == "text_time":
        if width == _REFINER_WIDTH:
            return Evidence("", f"its UNet has size conditioning and cross_attention_dim {width}: the SDXL refiner")
        return Evidence("sdxl", f"its UNet has size conditioning and cross_attention_dim {width}")
    if width == 1024 or unet.get("use_linear_projection"):
        return Evidence("sd2", f"its UNet has cross_attention_dim {width} and linear projections")
    return Evidence("sd1", f"its UNet has cross_attention_dim {width} and convolutional projections")


def family_of_checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> Evidence:
    """What a single-file checkpoint holds, from the names and shapes of its tensors."""
    blocks = "model.diffusion_model."
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2}
    if f"{blocks}input_blocks.0.0.weight" not in shapes or not widths:
        names = ", ".join(sorted(shapes)[:3])
        return Evidence("", f"it has no UNet in the Stable Diffusion layout (its first tensors: {names})")
    fact = f"its UNet has a cross-attention width of {max(widths)}"
    if shapes[f"{blocks}input_blocks.0.0.weight"][1] != 4:
        return Evidence("", "its UNet has more than 4 input channels: an inpainting or editing model")
    if f"{blocks}label_emb.0.0.weight" in shapes:
        if max(widths) == _REFINER_WIDTH:
            return Evidence("", f"{fact} and size conditioning: the SDXL refiner")
        return Evidence("sdxl", f"{fact} and size conditioning")
    if any(name.startswith("cond_stage_model.model.") for name in shapes):
        return Evidence("sd2", f"{fact} and an OpenCLIP text encoder")
    return Evidence("sd1", fact)
