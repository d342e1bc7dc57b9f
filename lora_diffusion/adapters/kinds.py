"""The adapter kinds that a config can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.lora import LoRA


class AdapterKind(Protocol):
    """What the rest of the program asks of an adapter class."""

    @property
    def kind(self) -> str: ...

    def __call__(
        self, base: Layer, rank: int, alpha: float, *, generator: torch.Generator | None = None, init: str = "default"
    ) -> Adapter: ...

    def from_tensors(self, base: Layer, tensors: Mapping[str, Tensor]) -> Adapter: ...


ADAPTERS: dict[str, AdapterKind] = {"lora": LoRA}
