"""Convolutions of small pictures on a CPU, as one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEW = 16  # columns: MKL is 2 to 5 times as fast when they are rows


def multiply_convolutions(root: nn.Module) -> None:
    """Let the float32 convolutions below `root` choose by the picture's size how they are computed.

    They stay the same objects with the same weights; results differ by the order of float32's sums. Doing it again
    changes nothing. For a CPU only.
    """
    for module in root.modules():
        if type(module) is nn.Conv2d and _can_be_product(module):
            module.__class__ = MatmulConv2d


def _can_be_product(layer: nn.Conv2d) -> bool:
    is_plain = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
    return is_plain and not isinstance(layer.padding, str) and layer.weight.dtype == torch.float32


class MatmulConv2d(nn.Conv2d):
    """A convolution that multiplies its weight by all windows of the pictures where that is faster.

    torch gives all but the smallest ones to oneDNN, which reorders the weight at every call, and for the gradient once
    more. That takes as long as there are weights; to lay out the windows (9 times the picture for a 3x3 kernel) takes
    as long as there are pixels. torch's own product reads the weight for each picture of a batch; `_Product` reads it
    once, which takes some copies more. Forward and backward, milliseconds of one core: oneDNN, torch's product and
    `_Product` (AMD EPYC without AVX-512, torch 2.13):

    | channels | pictures | batch 1 | batch 4 |
    | --- | --- | --- | --- |
    | 1280 to 1280 | 8 x 8 | 167, 66, 69 | 323, 301, 270 |
    | 1280 to 1280 | 4 x 4 | -, 37, 41 | 193, 116, 69 |
    | 1280 to 1280 | 2 x 2 | -, 69, 25 | 147, 269, 33 |
    | 256 to 256 | 2 x 2 | -, 2.0, 0.7 | 1.8, 8.8, 1.4 |
    | 640 to 640 | 8 x 8 | 28, 21, 25 | 75, 72, 68 |
    """

    MIN_CHANNELS_PER_PIXEL = 4
    """Of the output, and of one picture; 2.5 to 5 is where oneDNN takes as long."""
    MIN_WEIGHTS = 1 << 20
    """With fewer, oneDNN is as fast."""
    MIN_WEIGHTS_OF_FEW = 1 << 18
    """The same where a batch of one has few pixels, which torch gives to its own product whatever the weights."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        batch, _, height, width = input.shape
        pixels = (height // self.stride[0]) * (width // self.stride[1])
        is_alone, has_few = batch == 1, batch * pixels < _FEW
        enough = self.MIN_WEIGHTS_OF_FEW if is_alone and has_few else self.MIN_WEIGHTS
        is_large = self.out_channels < self.MIN_CHANNELS_PER_PIXEL * pixels
        if is_large or self.weight.numel() < enough or self.weight.requires_grad:
            return super().forward(input)
        if is_alone and not has_few:
            return torch.ops.aten.thnn_conv2d(
                input, self.weight, self.kernel_size, self.bias, self.stride, self.padding
            )
        return _Product.apply(input, self)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """conv2d with a frozen weight as one product for the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MatmulConv2d) -> Tensor:
        ctx.layer = layer
        ctx.shape = x.shape
        windows = nn.functional.unfold(x, **_geometry(layer))  # (B, C · k · k, N) of N pixels
        y = _product(layer.weight.flatten(1), windows.transpose(0, 1).flatten(1))
        y = y.view(-1, len(x), *_sides(x, layer)).transpose(0, 1).contiguous()
        return y if layer.bias is None else y.add_(layer.bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer = ctx.layer
        batch, _, height, width = ctx.shape
        grad_windows = _product(layer.weight.flatten(1).T, grad_output.transpose(0, 1).flatten(1))
        grad_windows = grad_windows.view(len(grad_windows), batch, -1).transpose(0, 1)
        return nn.functional.fold(grad_windows, (height, width), **_geometry(layer)), None


def _sides(x: Tensor, layer: nn.Conv2d) -> list[int]:
    """Height and width of the output."""
    assert not isinstance(layer.padding, str)
    sides = zip(x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True)
    return [(side + 2 * padding - kernel) // stride + 1 for side, padding, kernel, stride in sides]


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    return {"kernel_size": layer.kernel_size, "padding": layer.padding, "stride": layer.stride}


def _product(weight: Tensor, columns: Tensor) -> Tensor:
    """The product weight @ columns."""
    if columns.shape[1] < _FEW:
        return (columns.T.contiguous() @ weight.T).T.contiguous()
    return weight @ columns
