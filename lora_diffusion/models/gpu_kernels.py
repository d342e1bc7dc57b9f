"""Triton kernels for what stands between a UNet's matrix products: group norm with SiLU, and GEGLU.

Each reads its input once or twice and writes its output once, where torch's operations one by one also write and read
what is between them, and save it for the backward pass. All arithmetic is in float32 and rounded once. Weights are
frozen: only the input has a gradient. Imported on a GPU only; `fused_layers` has the plain twins.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# Triton comes with torch for CUDA, and what it compiles is Python by its syntax alone.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 4096  # numbers that one program holds at a time
_PART = 4 * _TILE  # numbers of a group that one program works through
_MAX_PARTS = 64  # programs per group
_GEGLU_BLOCK = 1024


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494), then SiLU if asked for. x: (B, C, H, W), best channels
    last, as the result is. weight, bias: (C,), without gradients.
    """
    apply: Any = _GroupNorm.apply
    return apply(x, weight, bias, groups, eps, silu)


def geglu(x: Tensor) -> Tensor:
    """(…, 2H) → (…, H): the first half times GELU of the second (Shazeer 2020, arXiv:2002.05202)."""
    apply: Any = _GEGLU.apply
    return apply(x)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        plan = _Plan(x, groups)
        out = torch.empty_like(x)
        partial = torch.empty((*plan.grid, 2), device=x.device)
        moments = torch.empty(plan.grid[0], 2, device=x.device)
        _moments[plan.grid](x, partial, *plan.sizes, **plan.tile)
        _normalise[plan.grid](x, partial, weight, bias, out, moments, eps, *plan.sizes, **plan.tile, SILU=silu)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, moments = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        plan = _Plan(x, ctx.groups)
        grad_x = torch.empty_like(x)
        partial = torch.empty((*plan.grid, 2), device=x.device)
        fixed = {**plan.tile, "SILU": ctx.silu}
        _gradient_sums[plan.grid](x, grad, weight, bias, moments, partial, *plan.sizes, **fixed)
        _gradient[plan.grid](x, grad, weight, bias, moments, partial, grad_x, *plan.sizes, **fixed)
        return grad_x, None, None, None, None, None


class _Plan:
    """How the work on a tensor (B, C, H, W) is shared out: programs are numbered by image and group, and by part."""

    def __init__(self, x: Tensor, groups: int) -> None:
        images, channels, height, width = x.shape
        rows, size = height * width, channels // groups
        parts = min(_MAX_PARTS, triton.next_power_of_2(triton.cdiv(rows * size, _PART)))
        self.grid = (images * groups, parts)
        self.sizes = (rows, channels, size, triton.cdiv(rows, parts))
        columns = triton.next_power_of_2(size)
        self.tile = {"PARTS": parts, "COLUMNS": columns, "ROWS": max(1, _TILE // columns)}


@triton.jit
def _start(rows, channels, size):  # pyright: ignore
    """Where this program's group begins: (offset in the picture's tensor, first channel)."""
    groups = channels // size
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    return image.to(tl.int64) * rows * channels + group * size, group * size


@triton.jit
def _moments(x, partial, rows, channels, size, chunk, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # pyright: ignore
    """Mean, and sum of squared differences from it, of one part of a group."""
    offset, _ = _start(rows, channels, size)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * chunk, rows)
    column = tl.arange(0, COLUMNS)[None, :]
    count, mean, squares = 0.0, 0.0, 0.0
    for first in range(part * chunk, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        is_there = (row < end) & (column < size)
        value = tl.load(x + offset + row * channels + column, mask=is_there, other=0.0).to(tl.float32)
        new = (tl.minimum(end - first, ROWS) * size).to(tl.float32)
        new_mean = tl.sum(value) / new
        distance = tl.where(is_there, value - new_mean, 0.0)
        # Chan et al. 1983: moments of two sets put together
        step = new_mean - mean
        squares += tl.sum(distance * distance) + step * step * count * new / (count + new)
        mean += step * new / (count + new)
        count += new
    place = partial + (tl.program_id(0) * PARTS + part) * 2
    tl.store(place, mean)
    tl.store(place + 1, squares)


@triton.jit
def _normalise(  # pyright: ignore
    x, partial, weight, bias, out, moments, eps, rows, channels, size, chunk,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Puts the parts' moments together and writes the normalised part; the first part also keeps (mean, 1 / std)."""
    offset, channel = _start(rows, channels, size)
    part = tl.program_id(1)
    every = tl.arange(0, PARTS)
    counts = (tl.maximum(tl.minimum((every + 1) * chunk, rows) - every * chunk, 0) * size).to(tl.float32)
    means = tl.load(partial + (tl.program_id(0) * PARTS + every) * 2)
    squares = tl.load(partial + (tl.program_id(0) * PARTS + every) * 2 + 1)
    total = (rows * size).to(tl.float32)
    mean = tl.sum(means * counts) / total
    distance = means - mean
    variance = tl.sum(squares + distance * distance * counts) / total
    scale = 1.0 / tl.sqrt(variance + eps)
    if part == 0:
        tl.store(moments + tl.program_id(0) * 2, mean)
        tl.store(moments + tl.program_id(0) * 2 + 1, scale)

    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + channel + column, mask=column < size, other=0.0).to(tl.float32)
    b = tl.load(bias + channel + column, mask=column < size, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * chunk, rows)
    for first in range(part * chunk, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        is_there = (row < end) & (column < size)
        place = offset + row * channels + column
        z = (tl.load(x + place, mask=is_there, other=0.0).to(tl.float32) - mean) * scale * w + b
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(out + place, z.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _into_norm(x, grad, place, is_there, mean, scale, w, b, SILU: tl.constexpr):  # pyright: ignore
    """(gradient of the normalised value, the normalised value), of one tile; 0 outside."""
    normal = (tl.load(x + place, mask=is_there, other=0.0).to(tl.float32) - mean) * scale
    g = tl.load(grad + place, mask=is_there, other=0.0).to(tl.float32)
    if SILU:
        z = normal * w + b
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    return tl.where(is_there, g * w, 0.0), tl.where(is_there, normal, 0.0)


@triton.jit
def _gradient_sums(  # pyright: ignore
    x, grad, weight, bias, moments, partial, rows, channels, size, chunk,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums, over one part of a group, of the gradient of the normalised values and of its product with them."""
    offset, channel = _start(rows, channels, size)
    part = tl.program_id(1)
    mean, scale = tl.load(moments + tl.program_id(0) * 2), tl.load(moments + tl.program_id(0) * 2 + 1)
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + channel + column, mask=column < size, other=0.0).to(tl.float32)
    b = tl.load(bias + channel + column, mask=column < size, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * chunk, rows)
    plain, product = 0.0, 0.0
    for first in range(part * chunk, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        is_there = (row < end) & (column < size)
        g, normal = _into_norm(x, grad, offset + row * channels + column, is_there, mean, scale, w, b, SILU)
        plain += tl.sum(g)
        product += tl.sum(g * normal)
    place = partial + (tl.program_id(0) * PARTS + part) * 2
    tl.store(place, plain)
    tl.store(place + 1, product)


@triton.jit
def _gradient(  # pyright: ignore
    x, grad, weight, bias, moments, partial, grad_x, rows, channels, size, chunk,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """∂x = (g - mean(g) - normal · mean(g · normal)) / std, over one part of a group."""
    offset, channel = _start(rows, channels, size)
    part = tl.program_id(1)
    every = tl.arange(0, PARTS)
    total = (rows * size).to(tl.float32)
    plain = tl.sum(tl.load(partial + (tl.program_id(0) * PARTS + every) * 2)) / total
    product = tl.sum(tl.load(partial + (tl.program_id(0) * PARTS + every) * 2 + 1)) / total
    mean, scale = tl.load(moments + tl.program_id(0) * 2), tl.load(moments + tl.program_id(0) * 2 + 1)
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + channel + column, mask=column < size, other=0.0).to(tl.float32)
    b = tl.load(bias + channel + column, mask=column < size, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * chunk, rows)
    for first in range(part * chunk, end, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        is_there = (row < end) & (column < size)
        place = offset + row * channels + column
        g, normal = _into_norm(x, grad, place, is_there, mean, scale, w, b, SILU)
        tl.store(grad_x + place, ((g - plain - normal * product) * scale).to(grad_x.dtype.element_ty), mask=is_there)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        half = x.shape[-1] // 2
        out = torch.empty((*x.shape[:-1], half), dtype=x.dtype, device=x.device)
        count = out.numel()
        _geglu[(triton.cdiv(count, _GEGLU_BLOCK),)](x, out, count, half, BLOCK=_GEGLU_BLOCK)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        count = grad.numel()
        _geglu_gradient[(triton.cdiv(count, _GEGLU_BLOCK),)](
            x, grad, grad_x, count, x.shape[-1] // 2, BLOCK=_GEGLU_BLOCK
        )
        return grad_x


@triton.jit
def _halves(count, half, BLOCK: tl.constexpr):  # pyright: ignore
    """(index in the output, index of its factor, index of its gate, whether it is there)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = index + index // half * half
    return index, first, first + half, index < count


@triton.jit
def _geglu(x, out, count, half, BLOCK: tl.constexpr):  # pyright: ignore
    index, first, second, is_there = _halves(count, half, BLOCK)
    factor = tl.load(x + first, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(x + second, mask=is_there, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Φ(gate)
    tl.store(out + index, (factor * gate * below).to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _geglu_gradient(x, grad, grad_x, count, half, BLOCK: tl.constexpr):  # pyright: ignore
    index, first, second, is_there = _halves(count, half, BLOCK)
    g = tl.load(grad + index, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(x + first, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(x + second, mask=is_there, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Φ(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_x + first, (g * gate * below).to(grad_x.dtype.element_ty), mask=is_there)
    tl.store(grad_x + second, (g * factor * (below + gate * density)).to(grad_x.dtype.element_ty), mask=is_there)
