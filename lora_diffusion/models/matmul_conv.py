"""Convolutions of small pictures on a CPU, as one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    """A convolution that multiplies its weight by all windows of the picture where that is faster.

    torch gives all but the smallest ones to oneDNN, which reorders the weight at every call, and for the gradient once
    more. That takes as long as there are weights; to lay out the windows (9 times the picture for a 3x3 kernel) takes
    as long as there are pixels. Forward and backward, milliseconds of one core, oneDNN against the product (batch 1,
    AMD EPYC without AVX-512, torch 2.13):

    | channels | 4 x 4 | 8 x 8 | 16 x 16 |
    | --- | --- | --- | --- |
    | 2560 to 1280 | 345, 93 | 403, 185 | |
    | 1280 to 1280 | 42, 42 | 227, 100 | 364, 332 |
    | 640 to 640 | | 23, 21 | 77, 71 |
    | 320 to 320 | | 6, 6 | 18, 18 |
    """

    MIN_CHANNELS_PER_PIXEL = 4
    """Of the output; 2.5 to 5 is where both take as long. Of one picture: each is a product by itself, and so what is
    computed for it does not depend on the others of its batch."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        height, width = input.shape[-2:]
        pixels = (height // self.stride[0]) * (width // self.stride[1])
        if self.out_channels < self.MIN_CHANNELS_PER_PIXEL * pixels:
            return super().forward(input)
        return torch.ops.aten.thnn_conv2d(input, self.weight, self.kernel_size, self.bias, self.stride, self.padding)
