"""The adapter kinds that a config can name, and the kind that a file's tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.dora import DoRA
from lora_diffusion.adapters.geometry import DORA_SCALE, kind_of
from lora_diffusion.adapters.loha import LoHa
from lora_diffusion.adapters.lokr import LoKr
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.errors import UserError


class AdapterKind(Protocol):
    """What the rest of the program asks of an adapter class."""

    @property
    def kind(self) -> str: ...

    def __call__(
        self, base: Layer, rank: int, alpha: float, *, generator: torch.Generator | None = None, init: str = "default"
    ) -> Adapter: ...

    def from_tensors(self, base: Layer, tensors: Mapping[str, Tensor]) -> Adapter: ...


ADAPTERS: dict[str, AdapterKind] = {"lora": LoRA, "dora": DoRA, "loha": LoHa, "lokr": LoKr}


def adapter_from_tensors(base: Layer, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a module's tensors on `base`, of whatever kind they are. Raises UserError if they do not fit."""
    kind = "dora" if DORA_SCALE in tensors else kind_of(tensors)
    if kind is None:
        raise UserError(f"no adapter has only these parts: {', '.join(sorted(tensors))}")
    return ADAPTERS[kind].from_tensors(base, tensors)
