"""Which implementation computes the UNet's attention."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from lora_diffusion.models.errors import ModelError

AttentionKind = Literal["auto", "sdpa", "eager", "xformers"]


def set_attention(unet: UNet2DConditionModel, kind: AttentionKind, device: torch.device) -> None:
    """Makes `unet` use `kind`. "auto" is torch's fused attention on a GPU, and the faster of two per layer on a CPU."""
    if kind == "auto":
        kind = "sdpa"
        if device.type == "cpu":
            unet.set_attn_processor(FasterOnCPU())
            return
    if kind == "sdpa":
        unet.set_attn_processor(AttnProcessor2_0())
    elif kind == "eager":
        unet.set_attn_processor(AttnProcessor())
    else:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise ModelError(
                f"model.attention = 'xformers': it cannot be used here ({error}). "
                "Install xformers on a machine with a CUDA GPU, or set model.attention = 'auto'."
            ) from error


class FasterOnCPU(AttnProcessor2_0):
    """Plain or fused attention, whichever is faster for the layer's size.

    torch's fused CPU kernel wins only on long sequences: at 1024 x 1024 tokens it took 55 ms forward and backward
    against 64, but 11.3 against 5.2 at 1024 x 77 and 8.3 against 3.9 at 256 x 256 (SD 1.5, bfloat16, torch 2.13).
    """

    MAX_PLAIN_PAIRS = 300**2

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, C). encoder_hidden_states: (B, M, D), or None for self-attention."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        is_short = hidden_states.shape[1] * keys.shape[1] <= self.MAX_PLAIN_PAIRS
        compute = AttnProcessor() if is_short else super().__call__
        return compute(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
