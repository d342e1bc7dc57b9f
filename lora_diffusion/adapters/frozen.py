"""The weight of a frozen layer, also when the layer keeps it in fewer bits than it computes with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


@runtime_checkable
class Quantised(Protocol):
    """A Linear that keeps its weight packed: `weight` has the real one's shape, dtype and device, but no values."""

    def dequantised_weight(self) -> Tensor:
        """The real weight (out, in), in the dtype that the layer computes with."""
        ...


def full_weight(layer: Layer) -> Tensor:
    """The layer's weight in float32 (float64 stays), (out, in[, k, k]). Dequantised anew at each call."""
    weight = layer.dequantised_weight() if isinstance(layer, Quantised) else layer.weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def unquantised(layer: Layer, weight: Tensor) -> Layer:
    """`layer` with `weight` written into it; where it is quantised, a plain frozen Linear in its place."""
    if not isinstance(layer, Quantised):
        layer.weight.copy_(weight)
        return layer
    assert isinstance(layer, nn.Linear)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)
