"""Several adapters as one LoRA file: exactly, or shortened to a rank with the error told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, Geometry
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.formats.names import usual_name
from lora_diffusion.progress import Track, silent
from lora_diffusion.streams import stream
from lora_diffusion.tools.block_weights import BlockWeight, block_factor, check_block_weights
from lora_diffusion.tools.deltas import balanced, delta_of, factors_of, factors_of_matrix
from lora_diffusion.tools.low_rank import (
    dare,
    rank_for_energy,
    relative_error,
    svd_of_factors,
    svd_of_matrix,
    ties,
    truncate,
)
from lora_diffusion.tools.on_base import change_of, layers_in_base
from lora_diffusion.tools.outputs import check_output
from lora_diffusion.tools.plain_lora import Factors, kernel_of, plain_modules, rounding_error
from lora_diffusion.tools.result_file import model_name, resolve_format, resolve_precision, result_metadata

METHODS = ("concat", "svd", "ties", "dare")
DEFAULT_DENSITY = 0.5
_DENSE = ("ties", "dare")


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    method: "concat" is exact; "svd" shortens the exact sum; "ties" and "dare" mix entry by entry, then shorten. rank
    or energy: what those are shortened to; without either, the largest rank of the inputs. density: share of entries
    that "ties" and "dare" keep, 0.5 if None. seed: for "dare". base: only a DoRA needs it. precision and format: of the
    file.
    """

    method: str = "concat"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int = 0
    block_weights: Sequence[BlockWeight] = ()
    base: Path | None = None
    precision: str = "auto"
    format: str = "kohya"

    def check(self) -> None:
        """Raises UserError for a value out of range, or for one that the method does not use."""
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: there are {', '.join(METHODS)}.")
        if self.method == "concat" and (self.rank is not None or self.energy is not None):
            raise UserError("--rank and --energy shorten the result, which concat never does. Use --method svd.")
        if self.rank is not None and self.energy is not None:
            raise UserError("--rank and --energy both say how short the result is. Give one of them.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: a rank is 1 or more.")
        if self.density is not None and self.method not in _DENSE:
            raise UserError(f"--density: {self.method} keeps all entries. Use it with --method ties or dare.")
        for option, share in (("--energy", self.energy), ("--density", self.density)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{option} {share}: should be above 0 and at most 1.")


@dataclass(frozen=True)
class MergedModule:
    """A module of the result. error: ‖result − what was to be held‖ / ‖…‖, Frobenius, before it is stored.

    rounding: the same for the rounding to the file's precision.
    """

    name: str
    rank: int
    error: float
    rounding: float


@dataclass(frozen=True)
class MergeReport:
    """What was merged. rank: what the modules were shortened to, None if they were not or by energy."""

    out: Path
    method: str
    adapters: Sequence[tuple[AdapterFile, float]]
    modules: Sequence[MergedModule]
    rank: int | None
    is_rank_chosen: bool
    precision: torch.dtype
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Change:
    """What one adapter does to one layer. weight: the adapter's, with block factors."""

    parts: Mapping[str, Tensor]
    geometry: Geometry
    weight: float


@dataclass(frozen=True)
class _Inputs:
    """Checked adapters. changes: canonical module name → what each adapter that has it does there."""

    family: str
    changes: Mapping[str, Sequence[_Change]]
    kernels: Mapping[str, tuple[int, ...]]
    base: BaseWeights | None = None
    notes: Sequence[str] = field(default=())


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    settings: MergeSettings,
    *,
    overwrite: bool = False,
    track: Track = silent,
) -> MergeReport:
    """Write the sum of the adapters, each times its weight, to `out` as one LoRA.

    They may differ in rank, alpha, kind and format. Raises UserError naming the file and the reason if they do not
    belong together, or if the result may not be written there; the inputs are never changed.
    """
    settings.check()
    format = resolve_format(settings.format)
    files = [path for path, _ in adapters]
    check_output(out, files if settings.base is None else [*files, settings.base], overwrite=overwrite)
    for path, weight in adapters:
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"{path}: the weight {weight:g} merges nothing. Give another number, or leave it out.")
    read = [(AdapterFile.read(path), weight) for path, weight in track(adapters, "Reading")]
    inputs = _check_inputs(read, settings)
    rank = _rank(settings, [file for file, _ in read])
    stored = {tensor.dtype for file, _ in read for parts in file.modules.values() for tensor in _weights(parts)}
    dtype = resolve_precision(settings.precision, stored)

    factors: dict[str, Factors] = {}
    modules: list[MergedModule] = []
    for name in track(list(inputs.changes), "Merging"):
        factors[name], error = _merged(name, inputs, settings, rank)
        modules.append(MergedModule(name, factors[name][0].shape[1], error, rounding_error(factors[name], dtype)))
    names = [model_name(path) for path in files]
    metadata = result_metadata(
        out, inputs.family, [file.metadata for file, _ in read], names, _record(adapters, settings, rank)
    )
    merged = AdapterFile(plain_modules(factors, inputs.kernels), metadata, family=inputs.family)
    merged.write(out, format=format, dtype=dtype)
    is_rank_chosen = rank is not None and settings.rank is None
    return MergeReport(out, settings.method, read, modules, rank, is_rank_chosen, dtype, inputs.notes)


def _check_inputs(files: Sequence[tuple[AdapterFile, float]], settings: MergeSettings) -> _Inputs:
    family = _common_family([file for file, _ in files])
    base = BaseWeights.open(settings.base) if settings.base is not None else None
    naming = family or (base.family if base else _family_of_names([file for file, _ in files]))
    renamed = [{usual_name(name, naming): name for name in file.modules} for file, _ in files]
    for (file, _), names in zip(files, renamed, strict=True):
        if base is not None:
            layers_in_base(file, base)
        elif doras := [name for name, geometry in file.geometries.items() if geometry.dora_axis is not None]:
            raise UserError(
                f"{file.path}: {doras[0]} is a DoRA, whose change depends on the weights of the base. Name the base it "
                "was trained on with --base."
            )
        if settings.method == "concat" and any(g.dora_axis is not None for g in file.geometries.values()):
            raise UserError(
                f"{file.path}: is a DoRA, whose change has the full rank of its layers and no short exact form. Use "
                "--method svd with a --rank."
            )
        if len(names) != len(file.modules):
            raise UserError(f"{file.path}: a text encoder is in the file under two names. Keep one of them.")
    check_block_weights(settings.block_weights, renamed)
    changes: dict[str, list[_Change]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    owners: dict[str, AdapterFile] = {}
    for number, ((file, weight), names) in enumerate(zip(files, renamed, strict=True), 1):
        for name, own_name in names.items():
            geometry, parts = file.geometries[own_name], file.modules[own_name]
            if name in changes:
                _check_same_layer(name, file, geometry, owners[name], changes[name][0].geometry)
            factor = block_factor(settings.block_weights, number, name)
            if base:
                kernels[name] = base.layers[name].shape[2:]
            else:
                kernels[name] = kernels.get(name) or kernel_of(file, own_name, family)
            owners.setdefault(name, file)
            changes.setdefault(name, []).append(_Change(parts, geometry, weight * factor))
    used = {name: kept for name, all_ in changes.items() if (kept := [change for change in all_ if change.weight])}
    if not used:
        raise UserError(
            "--block-weight: the factors are 0 for every module of every adapter; nothing is left to merge."
        )
    notes = [f"{file.path}: {note}" for file, _ in files for note in file.notes]
    return _Inputs(family or (base.family if base else ""), used, kernels, base, notes)


def _common_family(files: Sequence[AdapterFile]) -> str:
    """The family of those that show one."""
    known = [file for file in files if file.family]
    for file in known[1:]:
        if file.family != known[0].family:
            raise UserError(
                f"{file.path}: made for {FAMILY_NAMES[file.family]}, {known[0].path} for "
                f"{FAMILY_NAMES[known[0].family]}. Merge adapters of one model family only."
            )
    return known[0].family if known else ""


def _family_of_names(files: Sequence[AdapterFile]) -> str:
    """Of files that show no family, one that calls the first text encoder as they do: `lora_te` if any of them does."""
    return "sd1" if any(name.startswith("lora_te_") for file in files for name in file.modules) else "sdxl"


def _check_same_layer(name: str, file: AdapterFile, geometry: Geometry, owner: AdapterFile, first: Geometry) -> None:
    """Raises UserError if the layers that two adapters were made for are of different sizes."""
    if (first.outputs, first.inputs) != (geometry.outputs, geometry.inputs):
        raise UserError(
            f"{file.path}: {name} is made for a layer of {geometry.outputs} x {geometry.inputs}, in {owner.path} "
            f"it is {first.outputs} x {first.inputs}. They were trained on different models and cannot be merged."
        )


def _rank(settings: MergeSettings, files: Sequence[AdapterFile]) -> int | None:
    """What modules are shortened to; None if they are not, or by energy."""
    if settings.method == "concat" or settings.energy is not None:
        return None
    if settings.rank is not None:
        return settings.rank
    largest = max(geometry.rank for file in files for geometry in file.geometries.values())
    if largest == 0:
        raise UserError("The adapters have no rank of their own (whole LoKr). Say with --rank how long the result is.")
    return largest


def _merged(name: str, inputs: _Inputs, settings: MergeSettings, rank: int | None) -> tuple[Factors, float]:
    """The factors of a module of the result, and their relative error."""
    changes = inputs.changes[name]
    size = (changes[0].geometry.outputs, changes[0].geometry.inputs)
    if settings.method in _DENSE:
        deltas = [_delta(name, change, inputs.base) for change in changes]
        weights, density = [change.weight for change in changes], settings.density or DEFAULT_DENSITY
        if settings.method == "ties":
            delta = ties(deltas, weights, density)
        else:
            delta = dare(deltas, weights, density, stream(settings.seed, "dare", name))
        return _shortened(delta, settings, rank)
    if any(change.geometry.dora_axis is not None for change in changes):
        total = torch.zeros(size, dtype=torch.float64)
        for change in changes:
            total += change.weight * _delta(name, change, inputs.base).double()
        return _shortened(total, settings, rank)
    pairs = [balanced(*factors_of(change.parts, change.geometry), change.weight) for change in changes]
    up, down = torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs])
    if up.shape[1] > min(size):
        total = up.double() @ down.double()
        return (factors_of_matrix(total), 0.0) if settings.method == "concat" else _shortened(total, settings, rank)
    if settings.method == "concat":
        return (up, down), 0.0
    u, s, vh = svd_of_factors(up, down)
    kept = _kept(s, settings, rank)
    return truncate(u, s, vh, kept), relative_error(s, kept, math.sqrt(float(s.square().sum())))


def _shortened(delta: Tensor, settings: MergeSettings, rank: int | None) -> tuple[Factors, float]:
    u, s, vh = svd_of_matrix(delta, rank)
    kept = _kept(s, settings, rank)
    return truncate(u, s, vh, kept), relative_error(s, kept, float(torch.linalg.vector_norm(delta.double())))


def _kept(s: Tensor, settings: MergeSettings, rank: int | None) -> int:
    if settings.energy is not None:
        return rank_for_energy(s, settings.energy)
    assert rank is not None, "what is shortened has a rank or an energy"
    return min(rank, len(s))


def _delta(name: str, change: _Change, base: BaseWeights | None) -> Tensor:
    """ΔW (out, in·k·k) at weight 1."""
    if change.geometry.dora_axis is None:
        return delta_of(change.parts, change.geometry)
    assert base is not None, "a DoRA without a base was refused"
    return change_of(base.read(name), change.parts, change.geometry).flatten(1)


def _weights(parts: Mapping[str, Tensor]) -> list[Tensor]:
    """What is stored in the precision of the file; alpha and magnitudes are float32 in half-precision files too."""
    return [tensor for part, tensor in parts.items() if part not in (ALPHA, DORA_SCALE)]


def _record(adapters: Sequence[tuple[Path, float]], settings: MergeSettings, rank: int | None) -> dict[str, object]:
    """How the result was made, for its metadata: names without folders, which are private."""
    record: dict[str, object] = {
        "command": "merge",
        "method": settings.method,
        "adapters": [{"name": model_name(path), "weight": weight} for path, weight in adapters],
    }
    optional: dict[str, object] = {
        "rank": rank,
        "energy": settings.energy,
        "density": (settings.density or DEFAULT_DENSITY) if settings.method in _DENSE else None,
        "seed": settings.seed if settings.method == "dare" else None,
        "block_weights": [weight.text for weight in settings.block_weights] or None,
        "base": model_name(settings.base) if settings.base else None,
    }
    return record | {key: value for key, value in optional.items() if value is not None}
