"""The weight of a frozen layer, also when the layer keeps it in fewer bits than it computes with."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


@runtime_checkable
class Quantised(Protocol):
    """A layer that keeps its weight packed: `weight` has the real one's shape, dtype and device, but no values."""

    def dequantised_weight(self) -> Tensor:
        """The real weight (out, in[, k, k]), in the dtype that the layer computes with."""
        ...


class Multiplying(Protocol):
    """A frozen linear layer with `weight` in an order that only its own products can read."""

    def added_to(self, output: Tensor, rows: Tensor) -> Tensor:
        """`output` (N, out) + rows · Wᵀ, rounded once; may be `output` itself. rows: (N, in)."""
        ...

    def gradient(self, grad_rows: Tensor) -> Tensor:
        """grad_rows · W: (N, out) → (N, in)."""
        ...


Weight = Tensor | Multiplying


def is_multiplying(layer: nn.Module) -> bool:
    """Whether it is a `Multiplying`."""
    return type(layer) is not nn.Linear and hasattr(layer, "added_to")


def weight_to_multiply(layer: Layer) -> Weight:
    """What `add_product` and `gradient_of_product` take: the weight (out, in), or the layer if it multiplies itself."""
    return cast("Multiplying", layer) if is_multiplying(layer) else layer.weight.flatten(1)


def add_product(output: Tensor, rows: Tensor, weight: Weight) -> Tensor:
    """`output` + rows · Wᵀ, rounded once. The sum may be in the memory of `output`."""
    return output.addmm_(rows, weight.T) if isinstance(weight, Tensor) else weight.added_to(output, rows)


def gradient_of_product(grad_rows: Tensor, weight: Weight) -> Tensor:
    """grad_rows · W."""
    return grad_rows @ weight if isinstance(weight, Tensor) else weight.gradient(grad_rows)


def stored_weight(layer: Layer) -> Tensor:
    """The layer's weight (out, in[, k, k]) in the dtype it computes with. Dequantised anew at each call."""
    return (layer.dequantised_weight() if isinstance(layer, Quantised) else layer.weight).detach()


def full_weight(layer: Layer) -> Tensor:
    """The layer's weight in float32 (float64 stays)."""
    return wide(stored_weight(layer))


def wide(weight: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
