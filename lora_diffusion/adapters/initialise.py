"""How the two factors of a low-rank change start. Every start leaves the layer as it was: the second factor is 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Init = Callable[[Tensor, Tensor, torch.Generator], None]
"""Fills (down, up) in place. down: (rank, in, …), up: (out, rank, …), float32 on the generator's device."""


def kaiming(down: Tensor, up: Tensor, generator: torch.Generator) -> None:
    """Uniform within ±1/√fan_in, as torch starts a Linear or Conv2d (He et al. 2015, arXiv:1502.01852, a = √5)."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(up)


def gaussian(down: Tensor, up: Tensor, generator: torch.Generator) -> None:
    """Normal with standard deviation 1/rank, as PEFT's `init_lora_weights="gaussian"`."""
    nn.init.normal_(down, std=1 / down.shape[0], generator=generator)
    nn.init.zeros_(up)


INITS: dict[str, Init] = {"default": kaiming, "gaussian": gaussian}
