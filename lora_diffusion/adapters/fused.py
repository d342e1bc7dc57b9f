"""A frozen linear layer and its LoRA as one step of autograd: less to save, no sum of two outputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def lora_linear(x: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The sum x · Wᵀ + bias + scale · (x · downᵀ) · upᵀ, in the dtype of `base`, which `x` (…, in) must have.

    down: (r, in) and up: (out, r), float32, cast for the products; their gradients are float32. For the backward pass
    only `x` and x · downᵀ are kept.
    """
    output = _LoRALinear.apply(x, base.weight, base.bias, down, up, scale)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, output)


def can_fuse(x: Tensor, base: nn.Module) -> bool:
    """Whether `lora_linear` computes what the layer would: a plain frozen Linear in the input's dtype, no autocast."""
    return type(base) is nn.Linear and base.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = nn.functional.linear(x, down.to(x.dtype))  # (…, r)
        output = nn.functional.linear(x, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(_rows(hidden), up.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, hidden, weight, down, up)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, weight, down, up = ctx.saved_tensors
        grad_rows = _rows(grad_output)
        grad_hidden = (grad_rows @ up.to(x.dtype)).mul_(ctx.scale)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[3]:
            grad_down = (grad_hidden.T @ _rows(x)).to(down.dtype)
        if ctx.needs_input_grad[4]:
            grad_up = (grad_rows.T @ _rows(hidden)).to(up.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_hidden, down.to(x.dtype)).reshape(x.shape)
        return grad_x, None, None, grad_down, grad_up, None


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) → (rows, C)."""
    return tensor.reshape(-1, tensor.shape[-1])
