"""Which implementation computes the UNet's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import Attention, AttnProcessor, AttnProcessor2_0, UNet2DConditionModel

AttentionKind = Literal["auto", "sdpa", "eager", "xformers"]


def set_attention(unet: UNet2DConditionModel, kind: AttentionKind, device: torch.device) -> None:
    """Makes `unet` use `kind`. "auto" is torch's fused attention on a GPU, and the faster of two per layer on a CPU."""
    if kind == "auto":
        unet.set_attn_processor(FasterOnCPU() if device.type == "cpu" else FasterOnGPU())
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


class _Fused(AttnProcessor2_0):
    """torch's fused attention with fewer operations around it: projections of one input may be computed together.

    A layer says so by an attribute `together`, which is called with the input in place of all of them; see
    `lora_diffusion.adapters.together`.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, C). encoder_hidden_states: (B, M, D), or None for self-attention."""
        if not _is_plain(attn) or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None:
            query, key, value = _project(hidden_states, _projections(attn))
        else:
            query = attn.to_q(hidden_states)
            key, value = _project(encoder_hidden_states, _projections(attn))
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        output = self.attend(attn, query, key, value).transpose(1, 2).flatten(2)
        for layer in attn.to_out or ():  # a projection, and dropout
            output = layer(output)
        return output

    def attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (B, heads, N, D). key, value: (B, heads, M, D). (B, heads, N, D)."""
        return nn.functional.scaled_dot_product_attention(query, key, value)


class FasterOnGPU(_Fused):
    """Fused attention, always."""


def projections_with_one_input(root: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """The projections that "auto" calls together below `root`: q, k and v, or k and v of another input."""
    for module in root.modules():
        if isinstance(module, Attention) and isinstance(module.processor, _Fused) and _is_plain(module):
            yield _projections(module)


def _projections(attn: Attention) -> tuple[nn.Module, ...]:
    assert attn.to_k is not None and attn.to_v is not None
    return (attn.to_k, attn.to_v) if attn.is_cross_attention else (attn.to_q, attn.to_k, attn.to_v)


def _project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    together = getattr(layers[0], "together", None)
    return tuple(layer(x) for layer in layers) if together is None else together(x)


def _is_plain(attn: Attention) -> bool:
    """Whether nothing is done but project, attend and project."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.residual_connection)
    return not any(extras) and attn.rescale_output_factor == 1.0


class FasterOnCPU(_Fused):
    """Plain or fused attention, whichever is faster for the layer's size and dtype.

    Forward and backward, milliseconds, fused against plain (SD 1.5, batch 1, one core, torch 2.13):

    | tokens | bfloat16, AMX | bfloat16, AVX512 | float32 |
    | --- | --- | --- | --- |
    | 1024 x 1024 | 27, 20 | 63, 40 | 37, 49 |
    | 512 x 512 | 12.1, 6.8 | 35, 18 | 16.8, 17.3 |
    | 256 x 256 | 4.3, 2.8 | 8.7, 4.1 | 4.5, 4.6 |
    | 1024 x 77 | 5.7, 3.3 | 8.4, 4.6 | 4.4, 3.7 |

    The column of AVX512 is from before freed memory was kept (`models/heap.py`), from which the plain one gains most,
    and in bfloat16 the plain one was not one step yet (`_PlainAttention`), which takes a tenth less.
    Beyond 1024 x 1024 the plain one would keep too much for the backward pass. In bfloat16 it is that pass which gains:
    without one, the fused kernel takes three quarters of the plain one's time for 1024 x 1024.
    """

    MAX_PLAIN_PAIRS = 300**2
    MAX_PLAIN_PAIRS_OF_BF16 = 1024**2

    def attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `_Fused`."""
        batch, heads, queries, _ = query.shape
        limit = self.MAX_PLAIN_PAIRS
        if query.dtype == torch.bfloat16:
            limit = self.MAX_PLAIN_PAIRS_OF_BF16 if query.requires_grad else 0
        if queries * key.shape[2] > limit:
            return super().attend(attn, query, key, value)
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        if query.dtype == value.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            output: Tensor = _PlainAttention.apply(query, key, value, attn.scale)  # pyright: ignore[reportAssignmentType]
        else:
            output = torch.bmm(_scores(query, key, attn.scale).softmax(-1).to(value.dtype), value)
        return output.unflatten(0, (batch, heads))


class _PlainAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ) · value as one step of autograd. query: (B, N, D). key, value: (B, M, D).

    Against torch's own steps: the softmax takes the place of the scores, and its gradient that of its output's; inputs
    that are parts of a larger tensor are laid out once, not by every product; no product reads the softmax turned.
    With 1024 tokens and two threads 12.6 ms in place of 14.3, in a training's conditions, where memory is not cached.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        scores = _scores(query, key, scale)
        weights = torch.softmax(scores, -1, out=scores)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, weights = ctx.saved_tensors
        grad_query = grad_key = grad_value = None
        grad_output = grad_output.contiguous()
        if ctx.needs_input_grad[2]:
            grad_value = torch.bmm(grad_output.mT, weights).mT  # turned: what is large lies as it is
        grad = torch.bmm(grad_output, value.mT)
        torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)
        if ctx.needs_input_grad[0]:
            grad_query = _scaled_product(grad, key, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_key = _scaled_product(query.mT, grad, ctx.scale).mT
        return grad_query, grad_key, grad_value, None


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, N, M)."""
    return _scaled_product(query, key.mT, scale)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The batched product a @ b times `scale`, rounded once."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)  # with beta 0 the first is not read
