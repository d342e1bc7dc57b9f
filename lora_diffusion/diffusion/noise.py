"""The noise of one sample, from its own generator: it depends neither on its batch nor on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(shape: Sequence[int], generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise plus `offset` times one normal number per channel. (C, H, W), float32, CPU.

    The offset teaches the model to change an image's mean brightness (Guttenberg 2023, "Diffusion with Offset
    Noise"). The same generator state gives the same noise underneath, whatever the offset.
    """
    noise = torch.randn(tuple(shape), generator=generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=generator)
    return noise
