"""Adapters of a lower rank: the nearest change that the given rank can hold, by truncated SVD of each module's ΔW."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, DOWN, UP, Geometry
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.progress import Track, silent
from lora_diffusion.tools.convert import with_usual_names
from lora_diffusion.tools.deltas import Factors, change_in, refuse_dora
from lora_diffusion.tools.low_rank import (
    frobenius_norm_of_factors,
    is_dense_quicker,
    rank_for_energy,
    svd_of_factors,
    svd_of_matrix,
    truncate,
)
from lora_diffusion.tools.outputs import check_output
from lora_diffusion.tools.plain_lora import kernel_of
from lora_diffusion.tools.result_file import MADE_BY, model_name


@dataclass(frozen=True)
class ResizedModule:
    """error: ‖ΔW − what was written‖ / ‖ΔW‖, Frobenius, rounding included. ranks: before and after."""

    name: str
    ranks: tuple[int, int]
    error: float


@dataclass(frozen=True)
class Resizing:
    """What became of a file. error: over all modules together. bytes: before and after."""

    modules: tuple[ResizedModule, ...]
    error: float
    bytes: tuple[int, int]
    notes: tuple[str, ...]

    def worst(self, count: int) -> list[ResizedModule]:
        return sorted(self.modules, key=lambda module: -module.error)[:count]


def resize_file(
    source: Path,
    target: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    conv_rank: int | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> Resizing:
    """Writes `source`, a LoRA, LoHa or LoKr, as a LoRA of at most `rank`, in the dtype of most of its weights.

    rank: of each module, which has less where that is all it holds. energy: instead, the share in (0, 1] of each
    module's squared singular values that is kept. conv_rank: of convolutions with a kernel, for a `rank` elsewhere.
    All modules get one alpha, so that every reader gives them the same strength. Raises UserError for a DoRA.
    """
    if (rank is None) == (energy is None):
        raise UserError("--rank, --energy: give one of the two.")
    if any(value is not None and value < 1 for value in (rank, conv_rank)) or not (energy is None or 0 < energy <= 1):
        raise UserError("--rank and --conv-rank are 1 or more, --energy is above 0 and at most 1.")
    if conv_rank is not None and rank is None:
        raise UserError("--conv-rank goes with --rank; --energy finds the rank of each convolution itself.")
    check_output(target, [source], overwrite=overwrite)
    file = with_usual_names(AdapterFile.read(source))
    refuse_dora(file, "resize")
    kernels = {name: kernel_of(file, name) for name in file.modules}
    dtype = _common_dtype(file)
    shorter: dict[str, Factors] = {}
    for name in track(list(file.modules), "resizing"):
        limit = conv_rank if conv_rank is not None and math.prod(kernels[name]) > 1 else rank
        shorter[name] = shorten(change_in(file, name), limit, energy)
    alpha = float(Counter(down.shape[0] for _, down in shorter.values()).most_common(1)[0][0])
    modules = {name: _as_lora(factors, kernels[name], alpha, dtype) for name, factors in shorter.items()}
    optional = {"rank": rank, "energy": energy, "conv_rank": conv_rank}
    record = {"command": "resize", "adapter": model_name(source)}
    record |= {key: value for key, value in optional.items() if value is not None}
    metadata = {**file.metadata, MADE_BY: json.dumps(record)}
    resized = AdapterFile(modules, metadata, family=file.family, path=target)
    resized.write(target, dtype=dtype)
    report, error = _compare(file, resized, track)
    return Resizing(report, error, (source.stat().st_size, target.stat().st_size), file.notes)


def shorten(factors: Factors, rank: int | None, energy: float | None) -> Factors:
    """The best factors of `rank`, or of the smallest rank that holds the share `energy`; fewer if there are fewer."""
    up, down = factors
    u, s, vh = svd_of_matrix(up @ down) if is_dense_quicker(up, down) else svd_of_factors(up, down)
    if rank is None:
        rank = rank_for_energy(s, 1.0 if energy is None else energy)
    return truncate(u, s, vh, min(rank, max(1, int((s > 0).sum()))))


def _as_lora(factors: Factors, kernel: Sequence[int], alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """LoRA parts for factors, which are as large as one another also where alpha is not the rank."""
    up, down = factors
    rank = down.shape[0]
    up, down = up * (rank / alpha) ** 0.5, down * (rank / alpha) ** 0.5
    if kernel:
        down = down.reshape(rank, -1, *kernel)
        up = up.reshape(-1, rank, 1, 1)
    return {DOWN: down.to(dtype), UP: up.to(dtype), ALPHA: torch.tensor(alpha)}


def _common_dtype(file: AdapterFile) -> torch.dtype:
    counts = Counter(tensor.dtype for parts in file.modules.values() for part, tensor in parts.items() if part != ALPHA)
    dtype = counts.most_common(1)[0][0]
    return torch.float32 if dtype == torch.float64 else dtype


def _compare(before: AdapterFile, after: AdapterFile, track: Track) -> tuple[tuple[ResizedModule, ...], float]:
    report: list[ResizedModule] = []
    lost = total = 0.0
    for name in track(list(before.modules), "measuring"):
        old = change_in(before, name)
        new = change_in(after, name)
        norm = frobenius_norm_of_factors(*old)
        difference = _distance(old, new)
        ranks = (_rank(before.geometries[name], old), new[1].shape[0])
        report.append(ResizedModule(name, ranks, difference / norm if norm else 0.0))
        lost, total = lost + difference**2, total + norm**2
    return tuple(report), math.sqrt(lost / total) if total else 0.0


def _rank(geometry: Geometry, factors: Factors) -> int:
    """The rank of the change, which for LoHa and LoKr is that of the product rather than of its factors."""
    return geometry.rank if geometry.kind == "lora" else factors[1].shape[0]


def _distance(first: Factors, second: Factors) -> float:
    """‖first − second‖ as the norm of one product: (up₁, −up₂) @ (down₁; down₂)."""
    up = torch.cat([first[0], -second[0]], dim=1)
    return frobenius_norm_of_factors(up, torch.cat([first[1], second[1]]))


def ranks_by_part(modules: Sequence[ResizedModule]) -> Mapping[str, list[ResizedModule]]:
    """The modules by the prefix of their part: "lora_unet", "lora_te1", …"""
    parts: dict[str, list[ResizedModule]] = {}
    for module in modules:
        parts.setdefault("_".join(module.name.split("_", 2)[:2]), []).append(module)
    return parts
