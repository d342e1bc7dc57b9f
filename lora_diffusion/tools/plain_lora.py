"""Modules of a plain LoRA file made from factors, and the names and kernels of the layers that such a file changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, DOWN, MID, UP
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.names import peft_name, split_kohya_name
from lora_diffusion.tools.deltas import balanced
from lora_diffusion.tools.low_rank import frobenius_norm_of_factors

Factors = tuple[Tensor, Tensor]
"""(up (out, r), down (r, in·k·k)), float32, whose product is ΔW."""

PARTS = ("unet", "text_encoder", "text_encoder_2")

_WIDE_KERNEL = re.compile(r"_resnets_\d+_conv[12]$|samplers_\d+_conv$|lora_unet_conv_(?:in|out)$")
_PROJECTION = re.compile(r"lora_unet_\w+_attentions_\d+_proj_(?:in|out)$")
_TEXT_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_")


def plain_modules(
    factors: Mapping[str, Factors], kernels: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Tensor]]:
    """Modules of a LoRA file by canonical name; kernels: () linear, (1, 1), (3, 3), by name.

    Alpha is the rank, scale 1. Where ranks differ within a component, all of it gets the most common one as alpha, and
    the factors hold the difference: diffusers 0.42 reads differing alphas of attention layers and text encoders wrong.
    """
    ranks: dict[str, Counter[int]] = {}
    for name, (up, _) in factors.items():
        ranks.setdefault(part_of(name), Counter())[up.shape[1]] += 1
    modules: dict[str, dict[str, Tensor]] = {}
    for name, (up, down) in factors.items():
        rank, alpha = up.shape[1], ranks[part_of(name)].most_common(1)[0][0]
        if alpha != rank:
            up, down = balanced(up, down, rank / alpha)
        kernel = kernels[name]
        modules[name] = {
            DOWN: down.unflatten(1, (-1, *kernel)) if kernel else down,
            UP: up[:, :, None, None] if kernel else up,
            ALPHA: torch.tensor(float(alpha)),
        }
    return modules


def kernel_of(file: AdapterFile, name: str, family: str = "") -> tuple[int, ...]:
    """The kernel of the layer that a module of the file was made for, () for a linear one.

    family: of the model, where the file itself shows none. The shapes tell where the kind keeps them. LoHa and LoKr may
    flatten the kernel away: then the name tells, and for the projections around a transformer the family: they are 1x1
    convolutions in SD 1.x, and linear in SD 2.x and SDXL. Raises UserError for columns that are no such kernel.
    """
    parts, inputs = file.modules[name], file.geometries[name].inputs
    for part in (MID, "hada_t1", "lokr_t2", "lokr_w2"):
        if part in parts and parts[part].ndim == 4:
            return tuple(parts[part].shape[2:])
    if DOWN in parts:
        return tuple(parts[DOWN].shape[2:])
    if _WIDE_KERNEL.search(name):
        if inputs % 9:
            raise UserError(
                f"{file.path}: {name} should be a 3x3 convolution, but its {inputs} columns are no multiple of 9. The "
                "file is for a model that this version does not know."
            )
        return (3, 3)
    is_projection = _PROJECTION.match(name) is not None and (file.family or family) in ("sd1", "")
    return (1, 1) if is_projection or name.endswith("_conv_shortcut") else ()


def dotted_name(name: str) -> str:
    """A canonical name as "unet.mid_block.attentions.0.proj_in"; it comes back as it is if it is no known one."""
    try:
        return peft_name(name)
    except ValueError:
        return name


def part_of(name: str) -> str:
    """The component a module belongs to: one of `PARTS`."""
    if not name.startswith(_TEXT_PREFIXES):
        return "unet"
    return "text_encoder_2" if name.startswith("lora_te2_") else "text_encoder"


def is_adaptable(name: str) -> bool:
    """Whether programs that read adapters look for this layer in them: those in blocks and in CLIP's layers.

    Not the first and last convolution nor the embeddings of time and size, which most readers ignore.
    """
    try:
        path = split_kohya_name(name)[1]
    except ValueError:
        return False
    return path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "text_model.encoder.layers."))


def rounding_error(factors: Factors, dtype: torch.dtype) -> float:
    """‖ΔW stored − ΔW‖ / ‖ΔW‖ for factors that are rounded to `dtype`; 0 for ΔW = 0."""
    up, down = factors
    norm = frobenius_norm_of_factors(up, down)
    if dtype == torch.float32 or norm == 0:
        return 0.0
    # U'D' − UD = (U' − U)·D' + U·(D' − D)
    stored_up, stored_down = up.to(dtype).double(), down.to(dtype).double()
    left = torch.cat([stored_up - up, up], dim=1)
    right = torch.cat([stored_down, stored_down - down])
    return frobenius_norm_of_factors(left, right) / norm
