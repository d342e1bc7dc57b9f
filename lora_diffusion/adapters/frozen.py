"""The weight of a frozen layer, also when the layer keeps it in fewer bits than it computes with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


@runtime_checkable
class Quantised(Protocol):
    """A layer that keeps its weight packed: `weight` has the real one's shape, dtype and device, but no values."""

    def dequantised_weight(self) -> Tensor:
        """The real weight (out, in[, k, k]), in the dtype that the layer computes with."""
        ...


def stored_weight(layer: Layer) -> Tensor:
    """The layer's weight (out, in[, k, k]) in the dtype it computes with. Dequantised anew at each call."""
    return (layer.dequantised_weight() if isinstance(layer, Quantised) else layer.weight).detach()


def full_weight(layer: Layer) -> Tensor:
    """The layer's weight in float32 (float64 stays)."""
    return wide(stored_weight(layer))


def wide(weight: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
