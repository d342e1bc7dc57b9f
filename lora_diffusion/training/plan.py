"""When a run does what, and how its steps reach the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Launch = Literal["eager", "quiet", "graph"]
"""How steps reach the device: operation by operation, each value waited for; without waiting; as a whole, which is one
CUDA graph or on a CPU a recording."""


@dataclass(frozen=True)
class Plan:
    """How long a run is and when it saves, draws, validates and logs. All in optimiser steps; 0 switches off."""

    steps: int
    accumulation: int = 1
    max_grad_norm: float = 1.0
    save_every: int = 0
    keep_checkpoints: int = 2
    preview_every: int = 0
    validate_every: int = 0
    log_every: int = 1
    loader_workers: int = 0
    launch: Launch = "eager"
    compiles: bool = False
    """Whether blocks are compiled when they are first computed: such a step takes minutes."""

    def is_due(self, every: int, step: int) -> bool:
        """Every `every` steps and at the last; never when `every` is 0."""
        return every > 0 and (step % every == 0 or step == self.steps)
