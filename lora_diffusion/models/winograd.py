"""3x3 convolutions on a CPU with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4.1: a square of 2x2
outputs is A^T [(G g G^T) * (B^T d B)] A of a kernel g and of 4x4 inputs d. A frozen kernel is transformed once; the 16
products of each square are 16 matrix products over channels and squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.models.heap import trim_heap
from lora_diffusion.progress import Track, silent

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_ORDER = (0, 1, 2, 3)
_MIRRORED = (3, 1, 2, 0)  # G times a mirrored kernel has the same rows in this order
_STRIP_BYTES = 16 << 20  # of the transformed picture at once, so that it stays in the processor's cache

MIN_CHANNELS = 256
"""Of both sides. With fewer, the transformations take as long as is gained."""
MIN_PIXELS = 256
"""Of a batch. With fewer, reading the larger weights takes as long as is gained."""


def transform_convolutions(unet: nn.Module, num_pixels: int, track: Track = silent) -> int:
    """Transform the float32 convolutions of a Stable Diffusion UNet that gain from it; returns how many.

    unet: frozen, on the CPU. num_pixels: of the latents that it sees at once, the whole batch; what is smaller is
    computed as correctly. The layers stay the same objects. Their weights take 16/9 of their memory; never is more than
    one there twice. Doing it again transforms what the new number adds.
    """
    depth = len([name for name, _ in unet.named_modules() if name.startswith("down_blocks.") and name.count(".") == 1])
    paths = [
        path
        for path, module in unet.named_modules()
        if _can_be_transformed(module) and num_pixels >> 2 * _level(path, depth) >= MIN_PIXELS
    ]
    for path in track(paths, "transforming convolutions"):
        WinogradConv2d.transform(unet.get_submodule(path))
        trim_heap()
    return len(paths)


def _can_be_transformed(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and not isinstance(layer, WinogradConv2d)
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
        and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS
        and (layer.kernel_size, layer.padding, layer.padding_mode) == ((3, 3), (1, 1), "zeros")
        and (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
    )


def _level(path: str, depth: int) -> int:
    """How often the picture was halved for the layer at `path`, in diffusers' UNet of `depth` levels."""
    place, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    if place == "down_blocks":
        return int(number)
    if place == "up_blocks":
        return depth - 1 - int(number) - (".upsamplers." in path)
    return depth - 1 if place == "mid_block" else 0


class WinogradConv2d(nn.Conv2d):
    """A frozen 3x3 convolution that keeps the picture's size and has its kernel in transformed form only.

    Nothing is saved for backward: the gradient of its input is such a convolution too, by the kernel mirrored and with
    inputs and outputs exchanged, whose transformed form has the same numbers in another order. Forward and backward,
    milliseconds, against torch's own (batch 1, AMD EPYC without AVX-512, torch 2.13):

    | channels | pictures | one thread | two threads |
    | --- | --- | --- | --- |
    | 320 to 320 | 32 x 32 | 48, 34 | 30, 23 |
    | 640 to 320 | 32 x 32 | 95, 63 | 59, 42 |
    | 640 to 640 | 16 x 16 | 58, 35 | 35, 22 |
    | 1280 to 1280 | 16 x 16 | 296, 149 | 178, 71 |
    | 320 to 320 | 64 x 64 | 186, 141 | 106, 81 |
    """

    transformed: nn.Parameter
    """(16, out, in): G g G^T."""

    @staticmethod
    @torch.no_grad()
    def transform(layer: nn.Module) -> None:
        """Make one of `layer`, a frozen Conv2d for which it is meant. Its weight is given up."""
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight.detach()
        del layer.weight
        layer.__class__ = WinogradConv2d
        layer.transformed = nn.Parameter(_transform_kernel(weight), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in with the shape and dtype of the real weight and no memory; its values are NaN."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return torch.full((), torch.nan, dtype=self.transformed.dtype).expand(shape)

    def dequantised_weight(self) -> Tensor:
        """The weight (out, in, 3, 3) that was transformed, within float32's rounding. Made anew at each call."""
        rows = _transform_kernel_back(list(self.transformed.detach().unflatten(0, (4, 4))))
        columns = _transform_kernel_back(list(rows.unbind(1)))  # by place in the kernel: across, down
        return columns.permute(2, 3, 1, 0).contiguous()

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        return _FrozenConv.apply(input, self)  # pyright: ignore[reportReturnType]


class _FrozenConv(torch.autograd.Function):
    """conv2d with a transformed kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: WinogradConv2d) -> Tensor:
        ctx.layer = layer
        y = _convolve(x, layer.transformed, _ORDER)
        return y if layer.bias is None else y.add_(layer.bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _convolve(grad_output, ctx.layer.transformed.transpose(1, 2), _MIRRORED), None


def _convolve(x: Tensor, kernels: Tensor, order: Sequence[int]) -> Tensor:
    """(B, out, H, W) of x (B, in, H, W), with zeros around. kernels: (16, out, in), rows and columns in `order`."""
    batch, channels, height, width = x.shape
    x = nn.functional.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
    tall, wide = height + height % 2, width + width % 2
    y = x.new_empty(batch, kernels.shape[1], tall, wide)
    rows = 2 * max(1, _STRIP_BYTES // (8 * channels * wide * x.element_size()))
    images = max(1, rows // tall)
    for image in range(0, batch, images):
        for row in range(0, tall, rows):
            part = x[image : image + images, :, row : row + rows + 2]
            products = torch.bmm(kernels, _transform_picture(part, order))
            _transform_back(products, order, y[image : image + images, :, row : row + rows])
    return y[:, :, :height, :width].contiguous()


def _transform_kernel(g: Tensor) -> Tensor:
    """G g G^T: (16, out, in) of (out, in, 3, 3)."""
    matrix = torch.tensor(_G, dtype=g.dtype)
    return (torch.kron(matrix, matrix) @ g.flatten(2).flatten(0, 1).T).view(16, *g.shape[:2])


def _transform_kernel_back(m: Sequence[Tensor]) -> Tensor:
    """The three of whom G made these four."""
    return torch.stack([m[0], m[1] - m[2], m[3]])


def _transform_picture(d: Tensor, order: Sequence[int]) -> Tensor:
    """B^T d B for each square: (16, C, B * H / 2 * W / 2) of (B, C, H + 2, W + 2)."""
    batch, channels, height, width = d.shape
    rows = d.new_empty(4, channels, batch, height // 2 - 1, width)
    _differences([d[:, :, i : height - 2 + i : 2].transpose(0, 1) for i in range(4)], [rows[i] for i in order])
    squares = d.new_empty(4, 4, channels, batch, height // 2 - 1, width // 2 - 1)
    _differences([rows[..., i : width - 2 + i : 2] for i in range(4)], [squares[:, i] for i in order])
    return squares.view(16, channels, -1)


def _differences(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """B^T d for four rows."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _transform_back(products: Tensor, order: Sequence[int], y: Tensor) -> None:
    """A^T m A for each square, into y (B, O, H, W). products: (16, O, B * H / 2 * W / 2)."""
    batch, channels, height, width = y.shape
    m = products.view(4, 4, channels, batch, height // 2, width // 2)
    rows = m.new_empty(2, *m.shape[1:])
    _sums([m[i] for i in order], rows)
    places = y.view(batch, channels, height // 2, 2, width // 2, 2).permute(5, 3, 1, 0, 2, 4)  # across, down, O, B, …
    _sums([rows[:, i] for i in order], places)


def _sums(m: Sequence[Tensor], out: Tensor) -> None:
    """A^T m for four rows."""
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
