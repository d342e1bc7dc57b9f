"""What every adapter kind is: a module that wraps one frozen layer and changes its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.frozen import Layer, full_weight


class Adapter(nn.Module, ABC):
    """A trainable change of one frozen layer: W → W + strength · delta.

    A kind's constructor takes `(base, rank, alpha, *, generator, init)`; its parameters are float32, whatever the
    dtype of the base, and carry the names they have in adapter files. Nothing is drawn or remembered in `forward`, so
    gradient checkpointing may run it twice.
    """

    kind: ClassVar[str]
    """Its name in `ADAPTERS` and in configs."""

    def __init__(self, base: Layer) -> None:
        """Wraps `base` and freezes it."""
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.strength = 1.0
        """How much of the change is applied: 0 is exactly the base layer, 1 the adapter as trained."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to `base.weight` at strength 1: float32, the same shape. Differentiable."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What goes in the file, under the file's names.

        Detached, and sharing memory with the parameters: copy before keeping.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """The adapter that `tensors()` described, in float32 on the device of `base`.

        Raises UserError if names or shapes do not suit `base`.
        """

    def forward(self, x: Tensor) -> Tensor:
        """x: what `base` takes. Returns what `base` would with the changed weight, in the base's dtype."""
        if self.strength == 0:
            return self.base(x)
        return with_weight(self.base, x, changed_weight(self))

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """What the adapter adds to the base's output, times `strength`, in the dtype of `x`.

        strength: a number, or one per image: a tensor that broadcasts against x, (B, 1, …).
        """
        no_bias = None if self.base.bias is None else torch.zeros_like(self.base.bias)  # pyright: ignore[reportUnnecessaryComparison]
        output = with_weight(self.base, x, self.delta().to(x.dtype), no_bias)
        return (output * strength).to(x.dtype)


def with_weight(base: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`base(x)` with another weight, and with another bias if one is given; stride, padding and the rest as in base."""
    bias = base.bias if bias is None else bias
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return base._conv_forward(x, weight, bias)  # pyright: ignore[reportPrivateUsage]  # knows the padding mode


def changed_weight(adapter: Adapter) -> Tensor:
    """W + strength · delta, added in float32 and rounded once to the dtype that the base computes with."""
    return (full_weight(adapter.base) + adapter.strength * adapter.delta()).to(adapter.base.weight.dtype)
