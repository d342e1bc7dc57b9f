"""The VAE in half precision, with float32 for the pictures that overflow it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_diffusion.models.libraries import AutoencoderKL

logger = logging.getLogger(__name__)


class CheckedVAE:
    """Encodes and decodes with a VAE; what is not finite in half precision is computed again in float32.

    float16 ends at 65504, and the activations of some VAEs (SDXL's first one) go beyond that for some pictures, which
    then come out black. Every picture is checked on its own, so what one gives does not depend on the others in its
    batch. The VAE is float32 for the second try only.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self._has_told = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Means and log variances (B, 2C, h, w), float32, unscaled, of pixels (B, 3, H, W) in [-1, 1]."""
        return self._run(lambda x: self.vae.encode(x, return_dict=False)[0].parameters, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), float32, not clamped, of unscaled latents (B, C, h, w)."""
        # diffusers annotates `FloatTensor` for what is any float tensor
        return self._run(lambda z: self.vae.decode(z, return_dict=False)[0], latents)  # pyright: ignore[reportArgumentType]

    def _run(self, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        dtype = self.vae.dtype
        inputs = inputs.to(self.vae.device, torch.float32)
        given = inputs.to(dtype)
        if dtype == torch.bfloat16:  # on a CPU, where oneDNN's convolutions are 3 times as fast so; the rest follows
            given = given.contiguous(memory_format=torch.channels_last)
        outputs = compute(given).float()
        overflows = ~outputs.isfinite().flatten(1).all(dim=1)  # (B,)
        if dtype == torch.float32 or not bool(overflows.any()):
            return outputs
        if not self._has_told:
            self._has_told = True
            name = str(dtype).removeprefix("torch.")
            logger.info("the VAE overflows in %s; pictures that do are computed in float32", name)
        try:
            nn.Module.to(self.vae, torch.float32)  # diffusers' own `to` warns of casts
            outputs[overflows] = compute(inputs[overflows])
        finally:
            nn.Module.to(self.vae, dtype)  # exact: the values came from this dtype
        return outputs
