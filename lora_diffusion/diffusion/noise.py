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


def draw_pyramid_noise(shape: Sequence[int], generator: torch.Generator, levels: int, discount: float = 0.3) -> Tensor:
    """Noise with added low frequencies, brought back to unit variance. (C, H, W), float32, CPU.

    levels: coarser layers at most; each is 2 to 4 times smaller than the one before (drawn) and weighs `discount`
    times as much, and the last possible is one pixel wide. Whitaker 2023, "Multi-Resolution Noise for Diffusion
    Model Training". The variance is that of this sample alone, so that a sample does not depend on its batch.
    """
    channels, height, width = shape
    noise = torch.randn((channels, height, width), generator=generator)
    if levels < 1:
        return noise
    shrink = 1.0
    for level in range(1, levels + 1):
        shrink *= 2.0 + 2.0 * float(torch.rand((), generator=generator))
        size = (max(1, int(height / shrink)), max(1, int(width / shrink)))
        coarse = torch.randn((1, channels, *size), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        noise = noise + discount**level * fine[0]
        if min(size) == 1:
            break
    return noise / noise.std()
