"""Frozen bfloat16 linear layers and 1x1 convolutions on a CPU without the work that oneDNN does anew at every call.

A plain product brings its weight into the processor's own order each time. Where few rows meet a large weight, as in
the deep layers of Stable Diffusion, that is a third of the time and more.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.models.heap import trim_heap
from lora_diffusion.models.packed_conv import SETTINGS, PointwiseConv2d
from lora_diffusion.progress import Track, silent

_TYPICAL_ROWS = 64  # the order suits any number: within the error of measurement from 1 to 4096
_MAX_ROWS = 256  # packed against plain: 1.2 to 1.7 times as fast up to here, equal with 1024, up to half slower beyond
# Of four times as many as inputs, as in front of GEGLU: a plain product writes the bias to all of them first.
_MAX_ROWS_OF_MANY_OUTPUTS = 1024
_WIDTH_OF_ALL_PIXELS = 320


def pack_linears(
    root: nn.Module, num_pixels: int, track: Track = silent, *, apart_from: Container[nn.Module] = ()
) -> int:
    """Let a `PackedLinear` or `PackedPointwise` take the place of frozen bfloat16 layers below `root` that gain.

    Returns of how many. Convolutions are those that `pack_convolutions` has made `PointwiseConv2d`.

    num_pixels: of the latents that a UNet of Stable Diffusion, which `root` is or is a part of, sees at once. Its
    transformers of width 320 have a row for each; those twice as wide have a fourth of them, and so on. apart_from:
    layers that stay, because they are computed together with others.
    """
    paths = [
        path
        for path, layer in root.named_modules()
        if _can_be_packed(layer) and _num_rows(layer, num_pixels) <= _max_rows(layer) and layer not in apart_from
    ]
    for path in track(paths, "packing linear layers"):
        layer = root.get_submodule(path)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        root.set_submodule(path, PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedPointwise(layer))
        trim_heap()
    return len(paths)


def _can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear | PointwiseConv2d]:
    return (
        isinstance(layer, nn.Linear | PointwiseConv2d)
        and type(layer) in (nn.Linear, PointwiseConv2d)
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
        and not layer.weight.requires_grad
    )


def _num_rows(layer: nn.Linear | PointwiseConv2d, num_pixels: int) -> float:
    return num_pixels * (_WIDTH_OF_ALL_PIXELS / min(layer.weight.shape[:2])) ** 2


def _max_rows(layer: nn.Linear | PointwiseConv2d) -> int:
    outputs, inputs = layer.weight.shape[:2]
    return _MAX_ROWS_OF_MANY_OUTPUTS if outputs >= 4 * inputs else _MAX_ROWS


class _Packed(nn.Module):
    """A frozen layer whose weight is kept in oneDNN's order, and turned once more for gradients.

    Packed tensors are neither parameters nor buffers, because other parts of torch cannot copy or broadcast them; the
    layer stays on the CPU and in its dtype.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        """layer: a frozen one for which `pack_linears` is meant; it is left as it is."""
        nn.Module.__init__(self)  # not a subclass's, which would make a weight
        self.bias = layer.bias
        matrix = layer.weight.detach().flatten(1)
        self.packed = _pack(matrix)
        self.packed_turned = _pack(matrix.T.contiguous())
        self._stand_in = torch.full((), torch.nan, dtype=matrix.dtype).expand(layer.weight.shape)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """A stand-in with the shape and dtype of the real weight and no memory; its values are NaN."""
        return self._stand_in

    def dequantised_weight(self) -> Tensor:
        """The weight (out, in[, 1, 1]), bit for bit the one that was packed. Unpacked anew at each call."""
        return self.packed.to_dense().view(self.weight.shape)

    def added_to(self, output: Tensor, rows: Tensor) -> Tensor:
        """`output` + rows · Wᵀ, rounded once. rows: (N, in)."""
        return torch.ops.mkldnn._linear_pointwise.binary(rows, output, self.packed, None, "add")

    def gradient(self, grad_rows: Tensor) -> Tensor:
        """grad_rows · W: of the layer's input. grad_rows: (N, out)."""
        return _multiply(grad_rows, self.packed_turned)


class PackedLinear(_Packed, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer with its weight in oneDNN's order; see `_Packed`."""

    def __init__(self, layer: nn.Linear) -> None:
        _Packed.__init__(self, layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self)  # pyright: ignore[reportReturnType]


class PackedPointwise(_Packed, PointwiseConv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A 1x1 convolution with its weight in oneDNN's order, as a linear layer over channels, which are to lie last."""

    def __init__(self, layer: nn.Conv2d) -> None:
        _Packed.__init__(self, layer)
        for name in SETTINGS:
            setattr(self, name, getattr(layer, name))

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        output: Tensor = _FrozenLinear.apply(input.permute(0, 2, 3, 1), self)  # pyright: ignore[reportAssignmentType]
        return output.permute(0, 3, 1, 2)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a packed weight; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Packed) -> Tensor:
        ctx.layer = layer
        return _multiply(x, layer.packed, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.gradient(grad_output), None


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _pack(weight: Tensor) -> Tensor:
    """In oneDNN's order: an opaque tensor that `to_dense` undoes exactly."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
