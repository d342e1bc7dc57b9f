"""The base and the data set that ship, for tests of runs that learn something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training_runs import ROOT, write_config

BASE = ROOT / "samples" / "base"
INK = ROOT / "samples" / "ink"
ADAPTERS = ROOT / "samples" / "adapters"


def write_ink_config(path: Path, device: str, **sections: dict[str, Any]) -> Path:
    """The ink style: 12 steps of 4 pictures of 64 px, all of one shape, and a quarter of them kept for validation."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"steps": 12, "batch_size": 4, "device": device, "save_precision": "fp32"},
        "adapter": {"rank": 8, "alpha": 8.0, "targets": "attention-mlp"},
        "dataset": {"resolution": 64},
        "optimizer": {"lr": 2e-3},
        "validation": {"every": 4, "fraction": 0.25},
    }
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections}
    return write_config(path, BASE, INK, **merged)
