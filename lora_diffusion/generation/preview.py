"""Small pictures of unfinished latents: a linear map to RGB in place of the decoder, thousands of times faster."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.streams import stream

_NUM_PICTURES = 12
_COARSE = (2, 3, 4, 6)
"""Sides, in random values, of the smooth latents that the map is fitted to."""


class LatentPreview:
    """latents → RGB: a latent pixel's colour as a linear function of its channels, fitted to what the VAE decodes."""

    def __init__(self, weight: Tensor) -> None:
        """weight: (channels + 1, 3), the last row is the constant."""
        self._weight = weight

    @classmethod
    @torch.no_grad()
    def fit(cls, model: DiffusionModel) -> LatentPreview:
        """Least squares over decoded random smooth latents of unit variance: the time of a dozen decodings.

        Pictures are decoded at a small size: the relation of a latent pixel to its colour does not depend on it.
        """
        side = min(24, min(model.default_size) // model.latent_factor)
        rows: list[Tensor] = []
        colours: list[Tensor] = []
        for index in range(_NUM_PICTURES):
            generator = stream(0, "latent preview", index)
            coarse = _COARSE[index % len(_COARSE)]
            latents = torch.randn(1, model.latent_channels, coarse, coarse, generator=generator)
            latents = torch.nn.functional.interpolate(latents, (side, side), mode="bicubic", align_corners=True)
            pixels = model.decode_latents(latents.to(model.unet.device)).float().cpu()
            small = torch.nn.functional.avg_pool2d(pixels, model.latent_factor)  # (1, 3, side, side)
            rows.append(_with_constant(latents[0]))
            colours.append(small[0].flatten(1).T)
        solution = torch.linalg.lstsq(torch.cat(rows).double(), torch.cat(colours).double()).solution
        return cls(solution.float())

    def draw(self, latents: Tensor) -> Image.Image:
        """latents: (C, h, w), an estimate of the finished ones. A picture of w x h pixels."""
        height, width = latents.shape[1:]
        colours = _with_constant(latents.detach().float().cpu()) @ self._weight
        levels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(levels.reshape(height, width, 3).numpy())


def _with_constant(latents: Tensor) -> Tensor:
    """(C, h, w) → (h · w, C + 1)."""
    rows = latents.flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
