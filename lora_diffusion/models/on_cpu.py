"""A UNet in the form that a CPU computes fastest in."""

from __future__ import annotations

import torch

from lora_diffusion.models.attention import projections_with_one_input
from lora_diffusion.models.fused_layers import fuse_layers
from lora_diffusion.models.libraries import UNet2DConditionModel
from lora_diffusion.models.packed_conv import has_fast_bf16, pack_convolutions
from lora_diffusion.models.packed_linear import pack_linears
from lora_diffusion.models.winograd import transform_convolutions
from lora_diffusion.progress import Track, silent


def suit_to_cpu(
    unet: UNet2DConditionModel, num_pixels: int, track: Track = silent, *, needs_gradients: bool = True
) -> None:
    """Let a frozen `unet`, which is on the CPU, compute the same faster.

    num_pixels: of the latents that it sees at once. needs_gradients: those of its input, for which weights in bfloat16
    are kept in a second order.
    """
    if unet.dtype == torch.float32:
        transform_convolutions(unet, num_pixels, track)
    elif unet.dtype == torch.bfloat16 and has_fast_bf16():
        fuse_layers(unet)
        pack_convolutions(unet, track, needs_gradients=needs_gradients)
        if needs_gradients:  # where pictures are drawn, several at once and with guidance, too many rows meet them
            together = {layer for layers in projections_with_one_input(unet) for layer in layers}
            pack_linears(unet, num_pixels, track, apart_from=together)
