"""Whether the tensors of a file suit a layer; what all kinds ask before they take them over."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.frozen import Layer
from lora_diffusion.adapters.geometry import ALPHA, Geometry, geometry_of
from lora_diffusion.errors import UserError


def layer_size(base: Layer) -> tuple[int, int]:
    """(outputs, inputs): rows of the weight, and columns with the kernel flattened into them."""
    weight = base.weight
    if weight.is_floating_point():
        return weight.shape[0], math.prod(weight.shape[1:])
    return base.out_features, base.in_features  # pyright: ignore  # a quantised Linear, whose weight is packed


def layer_shape(base: Layer) -> tuple[int, ...]:
    """The shape of the real weight, also where a packed one is stored."""
    return tuple(base.weight.shape) if base.weight.is_floating_point() else layer_size(base)


def check_fit(base: Layer, tensors: Mapping[str, Tensor], *, kind: str) -> Geometry:
    """The geometry of the tensors. Raises UserError if they are not of this kind, or were made for another layer."""
    try:
        geometry = geometry_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except ValueError as error:
        raise UserError(f"not a {kind}: {error}") from None
    if geometry.name != kind:
        raise UserError(f"not a {kind} but a {geometry.name}: found {', '.join(sorted(tensors))}")
    if (geometry.outputs, geometry.inputs) != layer_size(base):
        outputs, inputs = layer_size(base)
        raise UserError(
            f"made for a layer of {geometry.outputs} x {geometry.inputs}; this layer needs {outputs} x {inputs}"
        )
    return geometry


def trainable(tensor: Tensor, base: Layer) -> nn.Parameter:
    """A float32 copy on the layer's device."""
    return nn.Parameter(tensor.detach().to(base.weight.device, torch.float32, copy=True))


def alpha_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """Alpha, or what stands for scale 1 where the file has none."""
    return float(tensors[ALPHA].item()) if ALPHA in tensors else float(rank)
