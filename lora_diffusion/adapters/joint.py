"""Adapters of several trainings on one frozen layer, each on its own rows of a common batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.fused import joint_lora_linear
from lora_diffusion.adapters.lora import LoRA


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
        adapters = [self._adapters.get(training) for training, _ in self.layout.shares]
        if all(adapter is None for adapter in adapters):
            return self.base(x)
        if len(adapters) == 1 and adapters[0] is not None:
            return adapters[0](x)
        rows = [count for _, count in self.layout.shares]
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
