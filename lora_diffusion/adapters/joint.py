"""Adapters of several trainings on one frozen layer, each on its own rows of a common batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.fused import joint_lora_linear
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.stacked import stackable, stacked_lora_layer, stacked_lora_linear
from lora_diffusion.adapters.together import ALIGNED


class JointLayout:
    """Which rows of the batch belong to which training. One object is shared by all joint layers of a model."""

    def __init__(self) -> None:
        self.shares: tuple[tuple[int, int], ...] = ()

    @contextmanager
    def divided(self, shares: Sequence[tuple[int, int]]) -> Generator[None]:
        """Inside, a batch is the rows of these trainings in turn: (number of the training, its rows).

        The backward pass belongs inside too: with gradient checkpointing it computes the layers anew.
        """
        earlier, self.shares = self.shares, tuple(shares)
        try:
            yield
        finally:
            self.shares = earlier

    def only(self, training: int) -> AbstractContextManager[None]:
        """Inside, every batch belongs to one training, however many rows it has."""
        return self.divided([(training, 0)])


class JointAdapters(nn.Module):
    """One base layer, an adapter of each training: the base is computed once, for all rows.

    Rows of trainings without an adapter here, and all rows where `layout` names none, see the base layer. With one
    training in the layout this is its adapter, bit for bit. The adapters are no submodules: whoever freezes the model
    for one training must not freeze the others.
    """

    together: JointTogether | None = None
    """What computes this layer and others with the same input, for whoever calls them all."""

    def __init__(self, base: Layer, layout: JointLayout, adapters: Mapping[int, Adapter]) -> None:
        """adapters: by number of the training. Raises ValueError if one of them wraps another layer than `base`."""
        super().__init__()
        if any(adapter.base is not base for adapter in adapters.values()):
            raise ValueError("an adapter wraps another layer than the joint one")
        self.base: Layer = base.requires_grad_(False)
        self.layout = layout
        self._adapters = dict(adapters)

    def forward(self, x: Tensor) -> Tensor:
        """x: (all rows of the layout, …)."""
        adapters = self.present()
        if all(adapter is None for adapter in adapters):
            return self.base(x)
        if len(adapters) == 1 and adapters[0] is not None:
            return adapters[0](x)
        rows = [count for _, count in self.layout.shares]
        if loras := stackable(x, rows, [[own] for own in adapters]):
            return stacked_lora_layer(x, self.base, loras)
        fused = [own for own in adapters if isinstance(own, LoRA) and own.is_fused(x)]
        if isinstance(self.base, nn.Linear) and len(fused) == len(adapters):
            scales = [own.strength * own.scale for own in fused]
            return joint_lora_linear(x, self.base, rows, [own.factors() for own in fused], scales)
        parts = torch.split(x, rows)
        given = [part if own is None else own.before_base(part) for own, part in zip(adapters, parts, strict=True)]
        is_same = all(new is old for new, old in zip(given, parts, strict=True))
        output: Tensor = self.base(x if is_same else torch.cat(given))
        changed = [
            made if own is None else own.after_base(part, made)
            for own, part, made in zip(adapters, given, torch.split(output, rows), strict=True)
        ]
        return torch.cat(changed)

    def present(self) -> list[Adapter | None]:
        """The adapter of each training in the layout."""
        return [self._adapters.get(training) for training, _ in self.layout.shares]


class JointTogether:
    """Joint layers that are given the same input, as q, k and v are: one product for all, where the LoRAs allow it.

    Their frozen weights become parts of one tensor.
    """

    def __init__(self, layers: Sequence[JointAdapters]) -> None:
        """layers: of which `can_join_together` is true."""
        self.layers = tuple(layers)
        self.weight = torch.cat([layer.base.weight.detach() for layer in layers])  # (k · out, in)
        for layer, part in zip(layers, self.weight.chunk(len(layers)), strict=True):
            layer.base.weight.data = part
            layer.together = self

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of x: (all rows of the layout, …, in)."""
        shares = self.layers[0].layout.shares
        by_training = list(zip(*(layer.present() for layer in self.layers), strict=True))
        if len(shares) > 1 and (loras := stackable(x, [count for _, count in shares], by_training)):
            return stacked_lora_linear(x, self.weight, None, loras)
        return tuple(layer(x) for layer in self.layers)


def can_join_together(layers: Sequence[nn.Module]) -> TypeGuard[Sequence[JointAdapters]]:
    """Whether `JointTogether` takes these layers: joint, around plain ones of one shape without bias."""
    joint = [layer for layer in layers if isinstance(layer, JointAdapters)]
    kinds = {(type(layer.base), layer.base.weight.shape, layer.base.weight.dtype) for layer in joint}
    if len(joint) < len(layers) or len(kinds) != 1 or any(layer.base.bias is not None for layer in joint):
        return False
    ((kind, shape, _),) = kinds
    return kind is nn.Linear and shape[0] % ALIGNED == 0
