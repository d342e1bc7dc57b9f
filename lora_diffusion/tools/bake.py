"""Adapters put into the weights of a copy of a base model, for programs that read no adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import Geometry
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import DTYPES, BaseWeights, write_changed
from lora_diffusion.progress import Track, silent
from lora_diffusion.tools.on_base import change_of, layers_in_base
from lora_diffusion.tools.result_file import MADE_BY, model_name


@dataclass(frozen=True)
class BakedLayer:
    """A changed layer. weight, change: ‖W‖ and ‖ΔW‖, Frobenius. lost: ‖stored W' − (W + ΔW)‖, by rounding."""

    name: str
    weight: float
    change: float
    lost: float
    dtype: torch.dtype

    @property
    def relative_change(self) -> float:
        return self.change / self.weight if self.weight else math.inf

    @property
    def rounding(self) -> float:
        """The error of the stored ΔW, relative to it."""
        return self.lost / self.change if self.change else 0.0


@dataclass(frozen=True)
class BakeReport:
    """notes: what a reader of the adapters should know."""

    out: Path
    family: str
    layers: Sequence[BakedLayer]
    notes: Sequence[str]

    @property
    def rounding(self) -> float:
        """The error of all stored changes together, relative to them."""
        change = math.hypot(*(layer.change for layer in self.layers))
        return math.hypot(*(layer.lost for layer in self.layers)) / change if change else 0.0


@dataclass(frozen=True)
class _Step:
    """What one adapter does to one layer."""

    parts: Mapping[str, Tensor]
    geometry: Geometry
    strength: float


@torch.no_grad()
def bake_adapters(
    base_path: Path, adapters: Sequence[tuple[Path, float]], out: Path, *, track: Track = silent
) -> BakeReport:
    """Write a copy of the base with the adapters in its weights, in the same form: a folder, or a single file.

    The adapters follow one another in the order given: a DoRA, whose change depends on the weights it finds, finds
    those that the adapters before it left. Sums are float32 and rounded once. Raises UserError if a file does not fit
    the base, if a weight would not be finite, or if `out` exists; nothing is left there then.
    """
    for path, strength in adapters:
        if strength == 0 or not math.isfinite(strength):
            raise UserError(f"{path}: the strength {strength:g} bakes nothing. Give another number, or leave it out.")
    base = BaseWeights.open(base_path)
    steps: dict[str, list[_Step]] = {}
    notes: list[str] = []
    for path, strength in track(adapters, "Reading"):
        file = AdapterFile.read(path)
        notes += [f"{path}: {note}" for note in file.notes]
        for name, layer in layers_in_base(file, base).items():
            steps.setdefault(layer, []).append(_Step(file.modules[name], file.geometries[name], strength))
    layers: list[BakedLayer] = []

    def change(name: str, weight: Tensor) -> Tensor:
        total = torch.zeros_like(weight)
        for step in steps[name]:
            total += step.strength * change_of(weight + total, step.parts, step.geometry)
        layers.append(_measured(name, weight, total, DTYPES[base.layers[name].dtype]))
        return total

    changes = {name: lambda weight, name=name: change(name, weight) for name in steps}
    metadata = None if base_path.is_dir() else _metadata(base_path, adapters)
    write_changed(base, out, changes, metadata=metadata, track=track)
    return BakeReport(out, base.family, layers, notes)


def _measured(name: str, weight: Tensor, change: Tensor, dtype: torch.dtype) -> BakedLayer:
    changed = weight + change
    lost = changed.to(dtype).float() - changed
    return BakedLayer(name, _norm(weight), _norm(change), _norm(lost), dtype)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _metadata(base: Path, adapters: Sequence[tuple[Path, float]]) -> dict[str, str]:
    record = {
        "command": "bake",
        "base": model_name(base),
        "adapters": [{"name": model_name(path), "strength": strength} for path, strength in adapters],
    }
    names = [model_name(base), *(model_name(path) for path, _ in adapters)]
    return {"modelspec.merged_from": ", ".join(names), MADE_BY: json.dumps(record)}
