"""Frozen linear layers with one input under LoRAs of several trainings of equal shapes: products of all at once.

One training after the other, they would be as many times seven tiny kernels per layer and step; on a fast GPU those
take longer than the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.frozen import Layer, Weight, add_product, gradient_of_product, weight_to_multiply
from lora_diffusion.adapters.fused import keep, kept, room
from lora_diffusion.adapters.lora import LoRA


def stacked_lora_layer(x: Tensor, base: Layer, by_training: Sequence[Sequence[LoRA]]) -> Tensor:
    """`stacked_lora_linear` of one layer. A 1x1 convolution is the same for every pixel of x: (rows, in, H, W)."""
    weight = weight_to_multiply(base)
    if isinstance(base, nn.Linear):
        return stacked_lora_linear(x, weight, base.bias, by_training)[0]
    return stacked_lora_linear(x.permute(0, 2, 3, 1), weight, base.bias, by_training)[0].permute(0, 3, 1, 2)


def stacked_lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, by_training: Sequence[Sequence[LoRA]]
) -> tuple[Tensor, ...]:
    """What each of k layers makes of x: k tensors (…, out), parts of one.

    x: (rows, …, in), as many rows of each training. weight: (k · out, in), the frozen layers one below the other, or
    one layer that multiplies by itself; bias: (k · out,). by_training: the k LoRAs of each training, as `stackable`
    returns them.
    """
    factors = [[lora.factors() for lora in loras] for loras in by_training]
    down = torch.cat([down.flatten(1) for pairs in factors for down, _ in pairs])  # (K · k · r, in)
    up = torch.cat([up.flatten(1) for pairs in factors for _, up in pairs])  # (K · k · out, r)
    num_trainings, num_layers, first = len(factors), len(factors[0]), by_training[0][0]
    down = down.view(num_trainings, -1, down.shape[-1])  # (K, k · r, in)
    up = up.view(num_trainings, num_layers, -1, up.shape[-1])  # (K, k, out, r)
    apply: Any = _Stacked.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return apply(x, weight, bias, down, up, first.strength * first.scale)


def stackable(
    x: Tensor, rows: Sequence[int], by_training: Sequence[Sequence[Adapter | None]]
) -> tuple[tuple[LoRA, ...], ...] | None:
    """The LoRAs, if these adapters are such of one rank and scale, with copies to read (see `LoRA.copies`).

    rows: of each training, in x.
    """
    found = tuple(
        tuple(own for own in adapters if isinstance(own, LoRA) and own.copies is not None and own.is_fused(x))
        for adapters in by_training
    )
    if any(len(loras) < len(adapters) for loras, adapters in zip(found, by_training, strict=True)):
        return None
    kinds = {(lora.rank, lora.scale, lora.strength) for loras in found for lora in loras}
    return found if len(kinds) == 1 and len(set(rows)) == 1 else None


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        num_trainings, num_layers, width, _ = up.shape
        rows = x.reshape(num_trainings, -1, x.shape[-1])  # (K, N, in)
        hidden = rows @ down.mT  # (K, N, k · r)
        made = room(rows, *rows.shape[:2], num_layers * width)  # (K, N, k · out)
        if bias is not None:
            made.copy_(bias)
        parts = made.chunk(num_layers, dim=-1)
        for index, inner in enumerate(hidden.chunk(num_layers, dim=-1)):  # before the base: see `fused`
            parts[index].baddbmm_(inner, up[:, index].mT, beta=0 if bias is None else 1, alpha=scale)
        made = add_product(made.flatten(0, 1), rows.flatten(0, 1), weight)
        keep(ctx, weight, rows, hidden, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return tuple(part.view(*x.shape[:-1], width) for part in made.chunk(num_layers, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, rows, hidden, down, up = kept(ctx)
        num_trainings, num_layers, width, _ = up.shape
        parts = [grad.reshape(num_trainings, -1, width) for grad in grads]  # (K, N, out) each
        grad_hidden, grad_up = torch.empty_like(hidden), torch.empty_like(up)
        outer = zip(parts, grad_hidden.chunk(num_layers, dim=-1), hidden.chunk(num_layers, dim=-1), strict=True)
        for index, (part, grad_inner, inner) in enumerate(outer):
            grad_inner.baddbmm_(part, up[:, index], beta=0, alpha=ctx.scale)
            grad_up[:, index].baddbmm_(part.mT, inner, beta=0, alpha=ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            joined = parts[0] if num_layers == 1 else torch.cat(parts, dim=-1)  # (K, N, k · out)
            grad_x = gradient_of_product(joined.flatten(0, 1), weight).view(rows.shape)
            grad_x = grad_x.baddbmm_(grad_hidden, down).view(ctx.shape)
        return grad_x, None, None, grad_hidden.mT @ rows, grad_up, None
