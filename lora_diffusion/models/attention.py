"""Which implementation computes the UNet's attention."""

from __future__ import annotations

from functools import cache
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
    """Plain or fused attention, whichever is faster for the layer's size, its dtype and the processor.

    Forward and backward, milliseconds, fused against plain (SD 1.5, batch 1, one core, torch 2.13):

    | tokens | bfloat16, AMX | bfloat16, AVX512 | float32 |
    | --- | --- | --- | --- |
    | 1024 x 1024 | 55, 64 | 63, 40 | 75, 135 |
    | 512 x 512 | | 35, 18 | 31, 29 |
    | 256 x 256 | 8.3, 3.9 | 8.7, 4.1 | 7.6, 7.0 |
    | 1024 x 77 | 11.3, 5.2 | 8.4, 4.6 | 7.3, 6.8 |

    Beyond 1024 x 1024 the plain one would keep too much for the backward pass.
    """

    MAX_PLAIN_PAIRS = 300**2
    MAX_PLAIN_PAIRS_OF_BF16_WITHOUT_AMX = 1024**2

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
        is_short = hidden_states.shape[1] * keys.shape[1] <= self._max_plain_pairs(hidden_states.dtype)
        compute = AttnProcessor() if is_short else super().__call__
        return compute(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def _max_plain_pairs(self, dtype: torch.dtype) -> int:
        has_slow_kernel = dtype == torch.bfloat16 and not _has_amx()
        return self.MAX_PLAIN_PAIRS_OF_BF16_WITHOUT_AMX if has_slow_kernel else self.MAX_PLAIN_PAIRS


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
