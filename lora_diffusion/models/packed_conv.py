"""Frozen bfloat16 convolutions on a CPU without the work that oneDNN does anew at every call.

A plain convolution brings its weight into the processor's own order each time, in both directions; on the deep layers
of Stable Diffusion, whose pictures are small and whose weights are large, that takes longer than the arithmetic. Those
of 3x3 are ordered once instead, and those of 1x1 are matrix products, whose weight is read as it is.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.models.heap import trim_heap
from lora_diffusion.progress import Track, silent

# Widths of which oneDNN can compute any picture's size in the order for a typical one, by trial: those of SD and SDXL,
# and powers of two. For others it may order the weight anew at every call: 384 channels of 4x4 took 63 ms so, not 0.3.
_WIDTHS = (64, 128, 256, 320, 512, 640, 960, 1280, 1920, 2560)
_TYPICAL_SIDE = 64  # of the latents; from 4 to 32 the order suits as well: within 15 % of the best one's time
_ONCE, _PADDING = (1, 1), (1, 1)
SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "transposed", "output_padding"),  # not for arithmetic: repr and other code of torch reads them
)


def pack_convolutions(root: nn.Module, track: Track = silent, *, needs_gradients: bool = True) -> int:
    """Let the bfloat16 convolutions below `root` compute without ordering their weights; returns how many are packed.

    A `PackedConv2d` takes the place of those of 3x3, one at a time, so that there is never a third copy of more than
    one weight. In SD 1.x, 2.x and SDXL these are all but the first and the last; they take twice their memory if their
    input needs gradients. In float32 the order of some widths depends on the picture's size. Those of 1x1 become
    `PointwiseConv2d`.
    """
    for module in root.modules():
        if _is_frozen_bf16(module) and (module.kernel_size, module.stride, module.padding) == (_ONCE, _ONCE, (0, 0)):
            module.__class__ = PointwiseConv2d
    layers = {path: module for path, module in root.named_modules() if _can_be_packed(module)}
    room = _room(*(layer.weight for layer in layers.values())) if needs_gradients and layers else None
    paths = [*layers]
    for path in track(paths, "packing convolutions"):
        root.set_submodule(path, PackedConv2d(layers.pop(path), needs_gradients=needs_gradients, room=room))
        trim_heap()
    return len(paths)


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), and torch knows how."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_be_packed(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        _is_frozen_bf16(layer)
        and {layer.in_channels, layer.out_channels} <= {*_WIDTHS}
        and (layer.kernel_size, layer.padding) == ((3, 3), (1, 1))
        and layer.stride in ((1, 1), (2, 2))
    )


def _is_frozen_bf16(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(layer) is nn.Conv2d
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
        and not layer.weight.requires_grad
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
    )


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a linear layer over channels, which are to lie last; 1.2 to 3 times as fast in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        output = nn.functional.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return output.permute(0, 3, 1, 2)


class PackedConv2d(nn.Conv2d):
    """A frozen 3x3 convolution with padding 1: channels last, nothing saved for backward.

    The gradient of its input is a convolution too, by the kernel mirrored and with inputs and outputs exchanged, which
    is packed as well; of one that halves the picture, the gradient is spread out with zeros between first. Packed
    tensors are neither parameters nor buffers, because other parts of torch cannot copy or broadcast them; the layer
    stays on the CPU and in its dtype.
    """

    def __init__(self, layer: nn.Module, *, needs_gradients: bool = True, room: Tensor | None = None) -> None:
        """layer: a frozen Conv2d for which `pack_convolutions` is meant; it is left as it is.

        needs_gradients: those of its input. Without, a backward pass raises RuntimeError. room: of `_room`, for this
        layer or for larger ones.
        """
        assert isinstance(layer, nn.Conv2d)
        nn.Module.__init__(self)  # not Conv2d's, which would make a weight
        for name in SETTINGS:
            setattr(self, name, getattr(layer, name))
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        self.dtype = weight.dtype
        self.bias = layer.bias
        self.packed = _pack(weight, layer.stride)
        self.packed_mirror = None
        if needs_gradients:
            self.packed_mirror = _pack(_mirror(weight, _room(weight) if room is None else room))
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
        ctx.shape = x.shape
        return _convolve(x, layer.packed, layer.bias, layer.stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: PackedConv2d = ctx.layer
        if layer.packed_mirror is None:
            raise RuntimeError("this convolution was packed without what the gradient of its input takes")
        if layer.stride != _ONCE:
            down, across = layer.stride
            spread = grad_output.new_zeros(len(grad_output), layer.out_channels, *ctx.shape[2:])
            spread = spread.contiguous(memory_format=torch.channels_last)
            spread[:, :, ::down, ::across] = grad_output
            grad_output = spread
        return _convolve(grad_output, layer.packed_mirror, None, _ONCE), None


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, _PADDING, stride, _ONCE, 1, "none", [], "")


def _room(*weights: Tensor) -> Tensor:
    """What `_mirror` takes for the largest of `weights`. Used for one after the other, it is cleared once only."""
    sizes = (weight.numel() + weight[:, :, 0, 0].numel() for weight in weights)
    return weights[0].new_empty(max(sizes))


def _mirror(weight: Tensor, room: Tensor) -> Tensor:
    """(out, in, h, w) → (in, out, h, w) with the kernel turned by 180 degrees; both with channels last. Made in `room`.

    One place of the kernel after the other: a third of the time that flipping and turning as a whole take.
    """
    outputs, inputs, *sides = weight.shape
    places = weight.permute(0, 2, 3, 1).flatten(1, 2)  # (out, h · w, in)
    mirrored = room[: weight.numel()].view(inputs, places.shape[1], outputs)
    one = room[weight.numel() :][: outputs * inputs].view(outputs, inputs)
    for place in range(places.shape[1]):
        mirrored[:, -1 - place] = one.copy_(places[:, place]).T
    return mirrored.unflatten(1, sides).permute(0, 3, 1, 2)


def _pack(weight: Tensor, stride: tuple[int, ...] = _ONCE) -> Tensor:
    """In oneDNN's order: an opaque tensor that `to_dense` undoes exactly. weight: with channels last."""
    typical = (1, weight.shape[1], _TYPICAL_SIDE, _TYPICAL_SIDE)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, _PADDING, stride, _ONCE, 1, typical)
