"""Frozen convolutions on a CPU, their weights brought once into the order that oneDNN computes in.

A plain convolution reorders its weight at every call, in both directions; on the deep layers of Stable Diffusion, whose
pictures are small and whose weights are large, that takes longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.models.heap import trim_heap

_CHANNEL_BLOCK = 64  # oneDNN's order of other widths depends on the picture's size, and a wrong guess costs 5 ms a call
_KERNEL = (3, 3)  # 1x1 is a matrix product, whose order depends on the picture's size too, and which gains little
_TYPICAL_SIDE = 64  # of the latents; from 4 to 32 the order suits as well: within 15 % of the best one's time
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "transposed", "output_padding"),  # not for arithmetic: repr and other code of torch reads them
)


def pack_convolutions(root: nn.Module) -> int:
    """Put a `PackedConv2d` in the place of the convolutions below `root` that gain from it; returns how many.

    One layer at a time: there is never a third copy of more than one weight. In SD 1.x, 2.x and SDXL these are all 3x3
    convolutions but the first, the last and those that halve the picture; they take twice their memory. For bfloat16:
    in float32 the order of some widths depends on the picture's size.
    """
    paths = [path for path, module in root.named_modules() if _gains(module)]
    for path in paths:
        root.set_submodule(path, PackedConv2d(root.get_submodule(path)))
        trim_heap()
    return len(paths)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), and torch knows how."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _gains(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.bfloat16)
        and module.in_channels % _CHANNEL_BLOCK == module.out_channels % _CHANNEL_BLOCK == 0
        and (module.kernel_size, module.padding, module.padding_mode) == (_KERNEL, (1, 1), "zeros")
        and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    )


class PackedConv2d(nn.Conv2d):
    """A frozen convolution of stride 1 that keeps the picture's size: channels last, nothing saved for backward.

    The gradient of its input is a convolution too, by the kernel mirrored and with inputs and outputs exchanged, which
    is packed as well. Packed tensors are neither parameters nor buffers, because other parts of torch cannot copy or
    broadcast them; the layer stays on the CPU and in its dtype.
    """

    def __init__(self, layer: nn.Module) -> None:
        """layer: a frozen Conv2d for which `pack_convolutions` is meant; it is left as it is."""
        assert isinstance(layer, nn.Conv2d)
        nn.Module.__init__(self)  # not Conv2d's, which would make a weight
        for name in _SETTINGS:
            setattr(self, name, getattr(layer, name))
        weight = layer.weight.detach()
        self.dtype = weight.dtype
        self.bias = layer.bias
        self.packed = _pack(weight, layer.padding)
        self.packed_mirror = _pack(weight.transpose(0, 1).flip(2, 3), layer.padding)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in with the shape and dtype of the real weight and no memory; its values are NaN."""
        return torch.full((), torch.nan, dtype=self.dtype).expand(
            self.out_channels, self.in_channels, *self.kernel_size
        )

    def dequantised_weight(self) -> Tensor:
        """The weight (out, in, k, k), bit for bit the one that was packed. Unpacked anew at each call."""
        return self.packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenConv.apply(input, self)  # pyright: ignore[reportReturnType]


class _FrozenConv(torch.autograd.Function):
    """conv2d with a packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedConv2d) -> Tensor:
        ctx.layer = layer
        return _convolve(x, layer.packed, layer.bias, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _convolve(grad_output, ctx.layer.packed_mirror, None, ctx.layer), None


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, layer: PackedConv2d) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
    )


def _pack(weight: Tensor, padding: Any) -> Tensor:
    """In oneDNN's order: an opaque tensor that `to_dense` undoes exactly."""
    typical = (1, weight.shape[1], _TYPICAL_SIDE, _TYPICAL_SIDE)
    return torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), padding, (1, 1), (1, 1), 1, typical)
