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

_ROWS, _COLUMNS = 32, 64  # pixels and channels that a program holds at a time: rows of 128 bytes or more
_MAX_CHUNKS = 128  # parts that an image's pixels are split into; a small kernel adds up what each part leaves
_GROUP_TILE = 2048  # chunks times channels that this kernel holds at a time
_GEGLU_TILE = {"ROWS": 4, "COLUMNS": 256}


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
        out, partial = torch.empty_like(x), plan.empty_partial()
        moments = torch.empty(len(x), 3, x.shape[1], device=x.device)
        _channel_sums[plan.grid](x, partial, *plan.sizes, **plan.tile)
        _moments[plan.groups](x, partial, moments, eps, *plan.group_sizes, **plan.group_tile)
        _normalise[plan.grid](x, weight, bias, moments, out, *plan.sizes, **plan.tile, SILU=silu)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, moments = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        plan = _Plan(x, ctx.groups)
        grad_x, partial = torch.empty_like(x), plan.empty_partial()
        means = torch.empty(len(x), 2, x.shape[1], device=x.device)
        fixed = {**plan.tile, "SILU": ctx.silu}
        _gradient_sums[plan.grid](x, grad, weight, bias, moments, partial, *plan.sizes, **fixed)
        _gradient_means[plan.groups](partial, means, *plan.group_sizes, **plan.group_tile)
        _gradient[plan.grid](x, grad, weight, bias, moments, means, grad_x, *plan.sizes, **fixed)
        return grad_x, None, None, None, None, None


class _Plan:
    """How the work on a tensor (B, C, H, W) is shared out.

    Large kernels have a program for each block of channels, chunk of pixels ("rows") and image; it reads whole memory
    lines, whatever the groups. Small ones have a program for each group of each image.
    """

    def __init__(self, x: Tensor, groups: int) -> None:
        images, channels, height, width = x.shape
        rows, size = height * width, channels // groups
        span = triton.cdiv(rows, _ROWS * _MAX_CHUNKS) * _ROWS  # rows of a chunk
        chunks = triton.cdiv(rows, span)
        self.grid = (triton.cdiv(channels, _COLUMNS), chunks, images)
        self.sizes = (rows, channels, span)
        self.tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}

        self.groups = (images * groups,)
        self.group_sizes = (rows, channels, size, chunks)
        columns = triton.next_power_of_2(size)
        self.group_tile = {"ROWS": max(1, _GROUP_TILE // columns), "COLUMNS": columns}
        self._partial = (images, chunks, 2, channels)
        self._device = x.device

    def empty_partial(self) -> Tensor:
        """For two sums of each channel over each chunk: (B, chunks, 2, C), float32."""
        return torch.empty(self._partial, device=self._device)


@triton.jit
def _start(rows, channels, span):  # pyright: ignore
    """(where this program's chunk begins in the image tensor, how many rows it has)."""
    first = tl.program_id(1) * span
    return (tl.program_id(2).to(tl.int64) * rows + first) * channels, tl.minimum(rows - first, span)


@triton.jit
def _channels_of_program(COLUMNS: tl.constexpr):  # pyright: ignore
    return tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _store_sums(partial, first, second, channels, COLUMNS: tl.constexpr):  # pyright: ignore
    """first, second: (ROWS, COLUMNS), to be summed over the rows."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place = partial + chunk * 2 * channels + channel
    tl.store(place, tl.sum(first, axis=0), mask=channel < channels)
    tl.store(place + channels, tl.sum(second, axis=0), mask=channel < channels)


@triton.jit
def _load_sums(partial, channels, size, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pyright: ignore
    """Both sums over all chunks, of each channel of this program's group: (COLUMNS,) each, 0 past the group."""
    groups = channels // size
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    column = tl.arange(0, COLUMNS)[None, :]
    base = partial + image.to(tl.int64) * chunks * 2 * channels + group * size + column
    first, second = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, chunks, ROWS):
        chunk = (start + tl.arange(0, ROWS))[:, None]
        is_there = (chunk < chunks) & (column < size)
        first += tl.load(base + chunk * 2 * channels, mask=is_there, other=0.0)
        second += tl.load(base + chunk * 2 * channels + channels, mask=is_there, other=0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _channel_sums(x, partial, rows, channels, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pyright: ignore
    """Sums over a chunk of each channel's distance from its value in the image's first row, and of its square.

    A value of the channel's own is about as far from its mean as others are: little cancels however large the mean is.
    """
    offset, count = _start(rows, channels, span)
    channel = _channels_of_program(COLUMNS)
    origin = x + tl.program_id(2).to(tl.int64) * rows * channels + channel
    first = tl.load(origin, mask=channel < channels, other=0.0).to(tl.float32)
    sums, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        is_there = (row < count) & (channel < channels)
        value = tl.load(x + offset + row * channels + channel, mask=is_there, other=0.0).to(tl.float32)
        distance = tl.where(is_there, value - first, 0.0)
        sums += distance
        squares += distance * distance
    _store_sums(partial, sums, squares, channels, COLUMNS)


@triton.jit
def _moments(  # pyright: ignore
    x, partial, moments, eps, rows, channels, size, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Puts the moments of a group's channels together (Chan et al. 1983): (mean, what it lost to rounding, 1 / std).

    They are written for each channel, (B, 3, C), so that what reads them need not know the groups.
    """
    sums, squares = _load_sums(partial, channels, size, chunks, ROWS, COLUMNS)
    groups = channels // size
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    column = tl.arange(0, COLUMNS)
    origin = x + image.to(tl.int64) * rows * channels + group * size
    first = tl.load(origin + column, mask=column < size, other=0.0).to(tl.float32)
    anchor = tl.load(origin).to(tl.float32)
    step = sums / rows  # from a channel's first value to its mean
    from_anchor = tl.where(column < size, first - anchor + step, 0.0)
    mean_from_anchor = tl.sum(from_anchor, axis=0) / size
    distance = tl.where(column < size, from_anchor - mean_from_anchor, 0.0)
    variance = tl.sum(squares / rows - step * step + distance * distance, axis=0) / size
    mean = anchor + mean_from_anchor
    place = moments + image * 3 * channels + group * size + column
    tl.store(place, mean, mask=column < size)
    tl.store(place + channels, mean_from_anchor - (mean - anchor), mask=column < size)
    tl.store(place + 2 * channels, 1.0 / tl.sqrt(variance + eps), mask=column < size)


@triton.jit
def _load_moments(moments, weight, bias, channels, COLUMNS: tl.constexpr):  # pyright: ignore
    """For each channel of this program, (1, COLUMNS): mean, what it lost to rounding, 1 / std, weight and bias."""
    channel = _channels_of_program(COLUMNS)
    is_there = channel < channels
    place = moments + tl.program_id(2) * 3 * channels + channel
    mean = tl.load(place, mask=is_there, other=0.0)
    rest = tl.load(place + channels, mask=is_there, other=0.0)
    scale = tl.load(place + 2 * channels, mask=is_there, other=0.0)
    w = tl.load(weight + channel, mask=is_there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=is_there, other=0.0).to(tl.float32)
    return mean, rest, scale, w, b


@triton.jit
def _normalise(  # pyright: ignore
    x, weight, bias, moments, out, rows, channels, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    offset, count = _start(rows, channels, span)
    channel = _channels_of_program(COLUMNS)
    mean, rest, scale, w, b = _load_moments(moments, weight, bias, channels, COLUMNS)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        is_there = (row < count) & (channel < channels)
        place = offset + row * channels + channel
        z = (tl.load(x + place, mask=is_there, other=0.0).to(tl.float32) - mean - rest) * scale * w + b
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(out + place, z.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _into_norm(x, grad, place, is_there, mean, rest, scale, w, b, SILU: tl.constexpr):  # pyright: ignore
    """(gradient of the normalised value, the normalised value), of one tile; the gradient is 0 outside."""
    normal = (tl.load(x + place, mask=is_there, other=0.0).to(tl.float32) - mean - rest) * scale
    g = tl.load(grad + place, mask=is_there, other=0.0).to(tl.float32)
    if SILU:
        z = normal * w + b
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    return g * w, normal


@triton.jit
def _gradient_sums(  # pyright: ignore
    x, grad, weight, bias, moments, partial, rows, channels, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk, for each channel, of the gradient of the normalised values and of its product with them."""
    offset, count = _start(rows, channels, span)
    channel = _channels_of_program(COLUMNS)
    mean, rest, scale, w, b = _load_moments(moments, weight, bias, channels, COLUMNS)
    plain, product = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        is_there = (row < count) & (channel < channels)
        place = offset + row * channels + channel
        g, normal = _into_norm(x, grad, place, is_there, mean, rest, scale, w, b, SILU)
        plain += g
        product += g * normal
    _store_sums(partial, plain, product, channels, COLUMNS)


@triton.jit
def _gradient_means(  # pyright: ignore
    partial, means, rows, channels, size, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Both sums over a whole group, divided by the number of its values; for each channel, (B, 2, C)."""
    plain, product = _load_sums(partial, channels, size, chunks, ROWS, COLUMNS)
    groups = channels // size
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    column = tl.arange(0, COLUMNS)
    place = means + image * 2 * channels + group * size + column
    tl.store(place, tl.sum(plain, axis=0) / rows / size, mask=column < size)
    tl.store(place + channels, tl.sum(product, axis=0) / rows / size, mask=column < size)


@triton.jit
def _gradient(  # pyright: ignore
    x, grad, weight, bias, moments, means, grad_x, rows, channels, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """∂x = (g - mean(g) - normal · mean(g · normal)) / std."""
    offset, count = _start(rows, channels, span)
    channel = _channels_of_program(COLUMNS)
    mean, rest, scale, w, b = _load_moments(moments, weight, bias, channels, COLUMNS)
    of_channel = means + tl.program_id(2) * 2 * channels + channel
    plain = tl.load(of_channel, mask=channel < channels, other=0.0)
    product = tl.load(of_channel + channels, mask=channel < channels, other=0.0)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        is_there = (row < count) & (channel < channels)
        place = offset + row * channels + channel
        g, normal = _into_norm(x, grad, place, is_there, mean, rest, scale, w, b, SILU)
        tl.store(grad_x + place, ((g - plain - normal * product) * scale).to(grad_x.dtype.element_ty), mask=is_there)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
        grid, sizes = _share_out_geglu(out)
        _geglu[grid](x, out, *sizes, **_GEGLU_TILE)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        grid, sizes = _share_out_geglu(grad)
        _geglu_gradient[grid](x, grad, grad_x, *sizes, **_GEGLU_TILE)
        return grad_x


def _share_out_geglu(out: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """(programs by rows and columns, (number of rows, H)). out: (…, H)."""
    half = out.shape[-1]
    rows = out.numel() // half
    return (triton.cdiv(rows, _GEGLU_TILE["ROWS"]), triton.cdiv(half, _GEGLU_TILE["COLUMNS"])), (rows, half)


@triton.jit
def _halves(rows, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pyright: ignore
    """(index in the output, index of its factor in the input, whether it is there); the gate is `half` further on."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row * half + column, row * 2 * half + column, (row < rows) & (column < half)


@triton.jit
def _geglu(x, out, rows, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pyright: ignore
    index, first, is_there = _halves(rows, half, ROWS, COLUMNS)
    factor = tl.load(x + first, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(x + first + half, mask=is_there, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Φ(gate)
    tl.store(out + index, (factor * gate * below).to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _geglu_gradient(x, grad, grad_x, rows, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pyright: ignore
    index, first, is_there = _halves(rows, half, ROWS, COLUMNS)
    g = tl.load(grad + index, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(x + first, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(x + first + half, mask=is_there, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Φ(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_x + first, (g * gate * below).to(grad_x.dtype.element_ty), mask=is_there)
    tl.store(grad_x + first + half, (g * factor * (below + gate * density)).to(grad_x.dtype.element_ty), mask=is_there)
