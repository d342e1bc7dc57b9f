"""A frozen linear layer and its LoRA as one step of autograd: less to save, no sum of two outputs.

What the LoRA adds is computed first, and the layer's product adds itself to that: its sum is in float32 and is rounded
once. The other way round, half precision would lose a change that is smaller than half the distance of the numbers
beside the layer's own output, which at the start of a training it is: with SD 1.5's architecture and random weights in
bfloat16 the losses of the first six steps were 4 % off float32's so, and are 0.2 % off now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.adapters.frozen import Weight, add_product, gradient_of_product, is_multiplying, weight_to_multiply


def lora_linear(x: Tensor, base: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The sum x · Wᵀ + bias + scale · (x · downᵀ) · upᵀ, in the dtype of `base`, which `x` (…, in) must have.

    down: (r, in) and up: (out, r), cast for the products; their gradients have their own dtypes. For the backward pass
    only `x`, x · downᵀ and the cast factors are kept. A 1x1 convolution is the same for every pixel of `x`
    (B, in, H, W), with factors (r, in, 1, 1) and (out, r, 1, 1).
    """
    apply: Any = _LoRALinear.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    weight = weight_to_multiply(base)
    if isinstance(base, nn.Linear):
        return apply(x, weight, base.bias, down, up, scale)
    pixels = x.permute(0, 2, 3, 1)
    return apply(pixels, weight, base.bias, down.flatten(1), up.flatten(1), scale).permute(0, 3, 1, 2)


def joint_lora_linear(
    x: Tensor, base: nn.Linear, rows: Sequence[int], factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]
) -> Tensor:
    """`lora_linear` with one product of the layer for all: the next `rows[i]` of x have `factors[i]` and `scales[i]`.

    factors: (down, up) each. No output is copied: each LoRA adds to its rows in place.
    """
    apply: Any = _JointLoRALinear.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    flat = [factor for pair in factors for factor in pair]
    return apply(x, weight_to_multiply(base), base.bias, tuple(rows), tuple(scales), *flat)


def can_fuse(x: Tensor, base: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether `lora_linear` computes what the layer would: a frozen layer in the input's dtype that is one product by
    its weight or multiplies by itself (see `frozen.Multiplying`), no autocast.
    """
    is_product = (
        type(base) is nn.Linear or is_multiplying(base) or (isinstance(base, nn.Conv2d) and _is_product(x, base))
    )
    return is_product and base.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def _is_product(x: Tensor, base: nn.Conv2d) -> bool:
    """Whether the convolution is a product over channels, and these lie last: on a CPU, as a GPU has kernels for it."""
    is_plain = (base.kernel_size, base.stride, base.padding, base.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return is_plain and x.ndim == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.shape, ctx.scale, ctx.dtypes = x.shape, scale, (down.dtype, up.dtype)
        rows, down, up = _rows(x), down.to(x.dtype), up.to(x.dtype)
        hidden = _narrow(rows, down.T)  # (rows, r)
        output = add_product(_begin(room(rows, len(rows), len(up)), hidden, up, bias, scale), rows, weight)
        keep(ctx, weight, rows, hidden, down, up)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, rows, hidden, down, up = kept(ctx)
        grad_rows = _rows(grad_output)
        grad_hidden = _narrow(grad_rows, up, ctx.scale)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[3]:
            grad_down = (grad_hidden.T @ rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_up = _narrow(grad_rows.T, hidden, ctx.scale).to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            grad_x = gradient_of_product(grad_rows, weight).addmm_(grad_hidden, down).view(ctx.shape)
        return grad_x, None, None, grad_down, grad_up, None


class _JointLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        rows: tuple[int, ...],
        scales: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        output = room(x, *x.shape[:-1], len(factors[1]))
        hidden: list[Tensor] = []
        parts = zip(
            torch.split(x, list(rows)),
            torch.split(output, list(rows)),
            factors[::2],
            factors[1::2],
            scales,
            strict=True,
        )
        for part, made, down, up, scale in parts:
            hidden.append(_narrow(_rows(part), down.to(x.dtype).T))  # (rows, r)
            _begin(_rows(made), hidden[-1], up.to(x.dtype), bias, scale)
        keep(ctx, weight, x, *hidden, *factors)
        ctx.rows, ctx.scales = rows, scales
        return add_product(_rows(output), _rows(x), weight).view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, x, *saved = kept(ctx)
        count = len(ctx.rows)
        hidden, factors = saved[:count], saved[count:]
        wants_x = bool(ctx.needs_input_grad[0])
        grad_x = gradient_of_product(_rows(grad_output), weight).view(x.shape) if wants_x else torch.empty_like(x)
        grads: list[Tensor] = []
        parts = zip(
            *(torch.split(tensor, list(ctx.rows)) for tensor in (x, grad_output.contiguous(), grad_x)),
            hidden, factors[::2], factors[1::2], ctx.scales, strict=True,
        )  # fmt: skip
        for part, grad_part, grad_in, inner, down, up, scale in parts:
            grad_rows = _rows(grad_part)
            grad_hidden = _narrow(grad_rows, up.to(x.dtype), scale)
            grads.append((grad_hidden.T @ _rows(part)).to(down.dtype))
            grads.append(_narrow(grad_rows.T, inner, scale).to(up.dtype))
            if wants_x:
                grad_in.view(-1, grad_in.shape[-1]).addmm_(grad_hidden, down.to(x.dtype))
        return (grad_x if wants_x else None, None, None, None, None, *grads)


def keep(ctx: Any, weight: Weight, *tensors: Tensor) -> None:
    """For the backward pass, where `kept` finds it."""
    is_tensor = isinstance(weight, Tensor)
    ctx.multiplying = None if is_tensor else weight
    ctx.save_for_backward(weight if is_tensor else None, *tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """(weight, *tensors)"""
    weight, *tensors = ctx.saved_tensors
    return ctx.multiplying if weight is None else weight, *tensors


def _begin(output: Tensor, hidden: Tensor, up: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Fill `output` (rows, out) with scale · hidden · upᵀ + bias: what the layer's product is to be added to."""
    if bias is None:
        return output.addmm_(hidden, up.T, beta=0, alpha=scale)
    return output.copy_(bias).addmm_(hidden, up.T, alpha=scale)


def room(like: Tensor, *shape: int) -> Tensor:
    """A tensor for the first part of a sum with beta 0, which is not read; inductor may make it a sum after all."""
    return like.new_zeros(shape) if torch.compiler.is_compiling() else like.new_empty(shape)


def _narrow(a: Tensor, b: Tensor, scale: float = 1) -> Tensor:
    """The product a @ b times `scale`, rounded once, where `b` has few columns."""
    # With few columns a product takes MKL two to five times as long as with few rows in float32, and oneDNN up to a
    # half longer in bfloat16 if `a` lies transposed.
    turns = a.device.type == "cpu" and (a.dtype == torch.float32 or not a.is_contiguous())
    left, right = (b.T, a.T) if turns else (a, b)
    product = left @ right if scale == 1 else torch.addmm(room(a), left, right, beta=0, alpha=scale)
    return product.T if turns else product


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) → (rows, C)."""
    return tensor.reshape(-1, tensor.shape[-1])
