"""What every adapter kind is: a module that wraps one frozen layer and changes its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.frozen import Layer, stored_weight, wide

__all__ = ["Adapter", "Dropout", "Layer", "changed_weight", "with_weight"]

_BELOW_LIMIT = 1 - 1e-5  # so that float32 rounding does not leave a limited change above the limit, to be limited again


@dataclass(frozen=True)
class Dropout:
    """Chances, each in [0, 1), of leaving out while training. What is kept is scaled up to make up for it.

    element: a number between the two factors. rank: one component of the rank, for a whole image. module: the whole
    adapter, for a whole batch (not made up for, as in LyCORIS and sd-scripts).
    """

    element: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class Adapter(nn.Module, ABC):
    """A trainable change of one frozen layer: W → W + strength · delta.

    A kind's constructor takes `(base, rank, alpha, *, generator, init)`; its parameters are float32, whatever the
    dtype of the base, and carry the names they have in adapter files. `forward` remembers nothing, and what it draws
    for dropout is a function of `dropout_seed`, so gradient checkpointing may run it twice.
    """

    kind: ClassVar[str]
    """Its name in `ADAPTERS` and in configs."""

    def __init__(self, base: Layer) -> None:
        """Wraps `base` and freezes it."""
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.strength = 1.0
        """How much of the change is applied: 0 is exactly the base layer, 1 the adapter as trained."""
        self.dropout = Dropout()
        self.dropout_seed: int | None = None
        """None: nothing is dropped. Otherwise this number alone decides what is."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the base's weight at strength 1: float32, the same shape. Differentiable."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What goes in the file, under the file's names. Detached; may share memory with the parameters."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """The adapter that `tensors()` described, in float32 on the device of `base`.

        Raises UserError if names or shapes do not suit `base`.
        """

    @abstractmethod
    def scale_delta(self, factor: float) -> None:
        """Multiply the change by `factor` > 0, spread evenly over the factors it is made of."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by parameter and buffer name: the live tensors themselves."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor.detach() for name, tensor in named if not name.startswith("base.")}

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the adapter, without the base's."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("base.")]

    def undecayed(self) -> list[nn.Parameter]:
        """Those of `trained()` that weight decay must leave alone, as 0 does not mean "no change" for them."""
        return []

    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta()`, 0-d."""
        return self.delta().square().sum().sqrt()

    @torch.no_grad()
    def limit_norm(self, limit: float) -> bool:
        """Scale the change down to the norm `limit` if it is larger; whether that was needed."""
        norm = self.delta_norm().item()
        if norm > limit:
            self.scale_delta(limit / norm * _BELOW_LIMIT)
        return norm > limit

    def forward(self, x: Tensor) -> Tensor:
        """x: what `base` takes. Returns what `base` would with the changed weight, in the base's dtype."""
        x = self.before_base(x)
        return self.after_base(x, self.base(x))

    def before_base(self, x: Tensor) -> Tensor:
        """What the base layer is given for `x`: the first half of `forward`, for who computes the base for several."""
        return x

    def after_base(self, x: Tensor, output: Tensor) -> Tensor:
        """The result of `forward`. x: from `before_base`. output: what the base layer made of it."""
        if self.strength == 0 or self.is_dropped():
            return output  # bit for bit the base
        return output + self.change(x, self.strength).to(output.dtype)

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """What the adapter adds to the base's output, times `strength`, in the dtype of `x`.

        strength: a number, or one per image: a tensor that broadcasts against x, (B, 1, …).
        """
        return (apply_weight(self.base, x, self.delta().to(x.dtype)) * strength).to(x.dtype)

    def is_dropped(self) -> bool:
        """Whether module dropout leaves this adapter out of the present batch."""
        if self.dropout_seed is None or self.dropout.module == 0:
            return False
        # Not the seed that the other kinds of dropout start from: they would depend on this number.
        generator = torch.Generator().manual_seed(self.dropout_seed ^ 1)
        return bool(torch.rand((), generator=generator) < self.dropout.module)


def with_weight(base: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`base(x)` with another weight, and with another bias if one is given; stride, padding and the rest as in base."""
    bias = base.bias if bias is None else bias
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return base._conv_forward(x, weight, bias)  # pyright: ignore[reportPrivateUsage]  # knows the padding mode


def apply_weight(base: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """`x` through `weight` alone, without a bias; stride, padding and the rest as in `base`."""
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight)
    return base._conv_forward(x, weight, None)  # pyright: ignore[reportPrivateUsage]  # knows the padding mode


def changed_weight(adapter: Adapter) -> Tensor:
    """W + strength · delta, added in float32 and rounded once to the dtype of W."""
    weight = stored_weight(adapter.base)
    return (wide(weight) + adapter.strength * adapter.delta()).to(weight.dtype)
