"""Frozen bfloat16 linear layers on a CPU without the work that oneDNN does anew at every call.

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
from lora_diffusion.progress import Track, silent

_TYPICAL_ROWS = 64  # the order suits any number: within the error of measurement from 1 to 4096
_MAX_ROWS = 256  # packed against plain: 1.2 to 1.7 times as fast up to here, equal with 1024, up to half slower beyond
_WIDTH_OF_ALL_PIXELS = 320


def pack_linears(
    root: nn.Module, num_pixels: int, track: Track = silent, *, apart_from: Container[nn.Module] = ()
) -> int:
    """Let a `PackedLinear` take the place of frozen bfloat16 layers below `root` that gain; returns of how many.

    num_pixels: of the latents that a UNet of Stable Diffusion, which `root` is or is a part of, sees at once. Its
    transformers of width 320 have a row for each; those twice as wide have a fourth of them, and so on. apart_from:
    layers that stay, because they are computed together with others.
    """
    paths = [
        path
        for path, layer in root.named_modules()
        if _can_be_packed(layer) and _num_rows(layer, num_pixels) <= _MAX_ROWS and layer not in apart_from
    ]
    for path in track(paths, "packing linear layers"):
        root.set_submodule(path, PackedLinear(root.get_submodule(path)))
        trim_heap()
    return len(paths)


def _can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
        and not layer.weight.requires_grad
    )


def _num_rows(layer: nn.Linear, num_pixels: int) -> float:
    return num_pixels * (_WIDTH_OF_ALL_PIXELS / min(layer.in_features, layer.out_features)) ** 2


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight (out, in) is kept in oneDNN's order, and turned once more for gradients.

    Packed tensors are neither parameters nor buffers, because other parts of torch cannot copy or broadcast them; the
    layer stays on the CPU and in its dtype.
    """

    def __init__(self, layer: nn.Module) -> None:
        """layer: a frozen Linear for which `pack_linears` is meant; it is left as it is."""
        assert isinstance(layer, nn.Linear)
        nn.Module.__init__(self)  # not Linear's, which would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        self.packed = _pack(weight)
        self.packed_turned = _pack(weight.T.contiguous())
        self._stand_in = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in with the shape and dtype of the real weight and no memory; its values are NaN."""
        return self._stand_in

    def dequantised_weight(self) -> Tensor:
        """The weight (out, in), bit for bit the one that was packed. Unpacked anew at each call."""
        return self.packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self)  # pyright: ignore[reportReturnType]

    def added_to(self, output: Tensor, rows: Tensor) -> Tensor:
        """`output` + rows · Wᵀ, rounded once. rows: (N, in)."""
        return torch.ops.mkldnn._linear_pointwise.binary(rows, output, self.packed, None, "add")

    def gradient(self, grad_rows: Tensor) -> Tensor:
        """grad_rows · W: of the layer's input. grad_rows: (N, out)."""
        return _multiply(grad_rows, self.packed_turned)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a packed weight; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
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
