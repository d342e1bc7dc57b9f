"""Frozen linear layers that are given the same input, with their LoRAs: one product for all, as for q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.adapters.base import Layer
from lora_diffusion.adapters.fused import room
from lora_diffusion.adapters.lora import LoRA

ALIGNED = 8  # numbers of 2 bytes: matrix units and fused attention want rows that begin at multiples of 16 bytes


def can_go_together(loras: Sequence[LoRA | None]) -> TypeGuard[Sequence[LoRA]]:
    """Whether `Together` takes these layers: plain, of one shape, rank and scale, without bias or dropout."""
    there = [lora for lora in loras if lora is not None and lora.start_down is None and _is_plain(lora.base)]
    kinds = {(lora.base.weight.shape, lora.base.weight.dtype, lora.rank, lora.scale, lora.strength) for lora in there}
    if len(there) < len(loras) or len(kinds) != 1 or any(lora.dropout_seed is not None for lora in there):
        return False
    ((outputs, inputs), _, rank, _, strength), *_ = kinds
    return strength != 0 and not any(size % ALIGNED for size in (outputs, inputs, len(loras) * rank))


def _is_plain(base: Layer) -> bool:
    return type(base) is nn.Linear and base.bias is None  # pyright: ignore[reportUnnecessaryComparison]


class Together:
    """k LoRA layers computed as one. Their frozen weights become parts of one tensor.

    down: (k · r, in) and up: (k, out, r), leaves in the dtype of the base: whoever trains fills them, and finds the
    gradients there.
    """

    def __init__(self, loras: Sequence[LoRA]) -> None:
        """loras: of which `can_go_together` is true."""
        first = loras[0].base.weight
        outputs, inputs = first.shape
        self.loras = tuple(loras)
        self.scale = loras[0].strength * loras[0].scale
        rank, count = loras[0].rank, len(loras)
        self.weight = torch.empty((count * (outputs + rank), inputs), dtype=first.dtype, device=first.device)
        """The frozen weights one below the other, then `down`."""
        for index, lora in enumerate(loras):
            place = self.weight[index * outputs : (index + 1) * outputs]
            place.copy_(lora.base.weight)
            lora.base.weight.data = place
        self.down = self.weight[count * outputs :].requires_grad_()
        self.up = torch.empty((count, outputs, rank), dtype=first.dtype, device=first.device, requires_grad=True)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of x (…, in): k tensors (…, out), parts of one."""
        apply: Any = _Together.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return apply(x, self.down, self.up, self.weight.detach(), self.scale)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, ...]:
        count, width, _ = up.shape
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        hidden = (rows @ down.T).view(len(rows), count, -1).transpose(0, 1)  # (k, N, r)
        base = weight[: count * width]
        if torch.compiler.is_compiling():  # which cannot trace what is written into transposed views
            made = torch.baddbmm(_nothing(rows), hidden, up.transpose(1, 2), beta=0, alpha=scale)
            output = torch.addmm(_side_by_side(made), rows, base.T)
        else:
            output = room(rows, len(rows), count * width)
            made = output.view(len(rows), count, width).transpose(0, 1)
            made.baddbmm_(hidden, up.transpose(1, 2), beta=0, alpha=scale)  # before the base: see `fused`
            output.addmm_(rows, base.T)
        ctx.save_for_backward(rows, hidden, up, weight)
        ctx.scale, ctx.shape = scale, x.shape
        return tuple(part.view(*x.shape[:-1], width) for part in output.view(len(rows), count, width).transpose(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, hidden, up, weight = ctx.saved_tensors
        count, width, rank = up.shape
        own = [grad.reshape(-1, width) for grad in grads]
        if torch.compiler.is_compiling():
            grad_made = torch.stack(own)
            grad_hidden = torch.baddbmm(_nothing(rows), grad_made, up, beta=0, alpha=ctx.scale)
            joined = torch.cat([_side_by_side(grad_made), _side_by_side(grad_hidden)], dim=1)  # (N, k · out + k · r)
        else:
            room = rows.new_empty(len(rows), count * rank)  # for the gradient of what is between the factors
            joined = torch.cat([*own, room], dim=1)
            grad_made, grad_hidden = _parts(joined, count, width)
            grad_hidden.baddbmm_(grad_made, up, beta=0, alpha=ctx.scale)
        grad_x = (joined @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_down = joined[:, count * width :].T @ rows
        grad_up = torch.baddbmm(up, grad_made.transpose(1, 2), hidden, beta=0, alpha=ctx.scale)
        return grad_x, grad_down, grad_up, None, None


def _parts(joined: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, k · C + k · r) → views (k, N, C) and (k, N, r)."""
    outer, inner = joined[:, : count * width], joined[:, count * width :]
    return outer.view(len(joined), count, width).transpose(0, 1), inner.view(len(joined), count, -1).transpose(0, 1)


def _side_by_side(parts: Tensor) -> Tensor:
    """(k, N, C) → (N, k · C)"""
    return parts.transpose(0, 1).flatten(1)


def _nothing(like: Tensor) -> Tensor:
    """What a product is added to where nothing is: not read with beta=0."""
    return like.new_zeros(1, 1, 1)
