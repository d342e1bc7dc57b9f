"""The difference of two base models as a LoRA, and an account of what such a file cannot hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import DTYPES, BaseWeights
from lora_diffusion.formats.checkpoint_layout import BaseFileError
from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.progress import Track, silent
from lora_diffusion.tools.low_rank import rank_for_energy, relative_error, svd_of_matrix, truncate
from lora_diffusion.tools.outputs import check_output
from lora_diffusion.tools.plain_lora import PARTS, Factors, dotted_name, is_adaptable, part_of, plain_modules
from lora_diffusion.tools.result_file import model_name, resolve_precision, result_metadata


@dataclass(frozen=True)
class ExtractSettings:
    """How much to keep.

    rank: of every layer, as far as the layer allows. conv_rank: of those in resnets, down- and upsamplers; None is
    `rank`. energy: share of each layer's squared change after which its rank may stop; None keeps one rank throughout.
    """

    rank: int
    conv_rank: int | None = None
    energy: float | None = None
    precision: str = "auto"

    def check(self) -> None:
        for option, rank in (("--rank", self.rank), ("--conv-rank", self.conv_rank)):
            if rank is not None and rank < 1:
                raise UserError(f"{option} {rank}: a rank is 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy {self.energy}: should be above 0 and at most 1.")


@dataclass(frozen=True)
class ExtractedLayer:
    """A layer that differs. squared: ‖ΔW‖². error: ‖what was kept − ΔW‖ / ‖ΔW‖, Frobenius."""

    name: str
    rank: int
    squared: float
    error: float

    @property
    def lost(self) -> float:
        """The part of `squared` that was not kept."""
        return self.squared * self.error**2


@dataclass(frozen=True)
class Unheld:
    """What differs and is not in the result. what: the sort of tensor. squared: of the difference, summed up."""

    what: str
    count: int
    squared: float


@dataclass(frozen=True)
class ExtractReport:
    """num_same: layers that adapters can change and that do not differ."""

    out: Path
    layers: Sequence[ExtractedLayer]
    num_same: int
    unheld: Sequence[Unheld]
    precision: torch.dtype
    notes: Sequence[str]

    @property
    def squared(self) -> float:
        """The whole squared difference of the two models, without their VAEs."""
        return sum(layer.squared for layer in self.layers) + sum(entry.squared for entry in self.unheld)

    @property
    def energy(self) -> float:
        """The share of `squared` that the result holds."""
        return sum(layer.squared - layer.lost for layer in self.layers) / self.squared


@torch.no_grad()
def extract_adapter(
    base_path: Path,
    tuned_path: Path,
    out: Path,
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    track: Track = silent,
) -> ExtractReport:
    """Write what `tuned` changed in `base` to `out`, layer by layer as the best LoRA of the rank.

    Each is a diffusers folder or a single file. Raises UserError if they are not of one family or differ in their
    layers' shapes, if nothing that an adapter can hold differs, or if the result may not be written there.
    """
    settings.check()
    check_output(out, [base_path, tuned_path], overwrite=overwrite)
    base, tuned = BaseWeights.open(base_path), BaseWeights.open(tuned_path)
    _check_comparable(base, tuned)
    factors: dict[str, Factors] = {}
    layers: list[ExtractedLayer] = []
    unheld: Counter[str] = Counter()
    lost: dict[str, float] = {}
    adaptable = [name for name in base.layers if is_adaptable(name)]
    for name in track(adaptable, "Comparing layers"):
        delta = tuned.read(name) - base.read(name)
        _check_finite(tuned, name, delta)
        if delta.any():
            layer, factors[name] = _shortened(name, delta, settings)
            layers.append(layer)
    for name in track(_other_tensors(base, tuned), "Comparing the rest"):
        delta = tuned.read(name) - base.read(name)
        _check_finite(tuned, name, delta)
        if delta.any():
            unheld[_sort_of(name)] += 1
            lost[_sort_of(name)] = lost.get(_sort_of(name), 0.0) + float(delta.double().square().sum())
    rest = [Unheld(what, count, lost[what]) for what, count in unheld.items()]
    if not layers:
        found = f" There are differences in {_listed(rest)}, which no adapter holds." if rest else ""
        raise UserError(f"{tuned_path}: its layers are those of {base_path}; there is nothing to extract.{found}")
    kernels = {name: base.layers[name].shape[2:] for name in factors}
    stored = {DTYPES[model.layers[name].dtype] for name in factors for model in (base, tuned)}
    dtype = resolve_precision(settings.precision, stored)
    metadata = result_metadata(out, base.family, [], [], _record(base, tuned, settings))
    metadata["ss_sd_model_name"] = model_name(base_path)
    AdapterFile(plain_modules(factors, kernels), metadata, family=base.family).write(out, dtype=dtype)
    return ExtractReport(out, layers, len(adaptable) - len(layers), rest, dtype, _notes(base, tuned, factors))


def _shortened(name: str, delta: Tensor, settings: ExtractSettings) -> tuple[ExtractedLayer, Factors]:
    is_conv = "_resnets_" in name or "samplers_" in name
    rank = settings.conv_rank if is_conv and settings.conv_rank is not None else settings.rank
    matrix = delta.flatten(1)
    norm = float(torch.linalg.vector_norm(matrix.double()))
    u, s, vh = svd_of_matrix(matrix, None if settings.energy is not None else rank)
    if settings.energy is not None:
        rank = min(rank, rank_for_energy(s, settings.energy))
    rank = min(rank, len(s))
    return ExtractedLayer(name, rank, norm**2, relative_error(s, rank, norm)), truncate(u, s, vh, rank)


def _check_comparable(base: BaseWeights, tuned: BaseWeights) -> None:
    if base.family != tuned.family:
        raise BaseFileError(
            f"{tuned.path}: is {FAMILY_NAMES[tuned.family]}, {base.path} is {FAMILY_NAMES[base.family]}. Give the base "
            "that the model was tuned from."
        )
    for one, other in ((base, tuned), (tuned, base)):
        if missing := [name for name in one.layers if name not in other.layers]:
            raise BaseFileError(
                f"{other.path}: lacks {len(missing)} layers of {one.path}, such as {dotted_name(missing[0])}. Give two "
                "whole models of one architecture."
            )
    for name, place in base.layers.items():
        if place.shape != tuned.layers[name].shape:
            raise BaseFileError(
                f"{tuned.path}: {dotted_name(name)} has shape {tuned.layers[name].shape}, in {base.path} it is "
                f"{place.shape}. Give the base that the model was tuned from."
            )


def _check_finite(model: BaseWeights, name: str, delta: Tensor) -> None:
    if not bool(torch.isfinite(delta).all()):
        raise BaseFileError(
            f"{model.path}: its difference from the base in {dotted_name(name)} is not finite. One of the two models "
            "is damaged; get it again."
        )


def _other_tensors(base: BaseWeights, tuned: BaseWeights) -> list[str]:
    """Tensors of both that no adapter holds and whose difference is a number."""
    layers = [name for name in base.layers if not is_adaptable(name)]
    return layers + [
        name
        for name, place in base.others.items()
        if name in tuned.others
        and name.partition(".")[0] in PARTS
        and place.shape == tuned.others[name].shape
        and not place.dtype.startswith(("I", "U", "BOOL"))
    ]


def _sort_of(name: str) -> str:
    if name.endswith(".bias"):
        return "biases"
    if "norm" in name or "layer_norm" in name:
        return "norm layers"
    if "embeddings" in name:
        return "text embeddings"
    if "time_embed" in name or "add_embedding" in name:
        return "time and size embedding"
    return "first and last convolution" if "conv_in" in name or "conv_out" in name else "other weights"


def _listed(unheld: Sequence[Unheld]) -> str:
    return ", ".join(f"{entry.count} {entry.what}" for entry in unheld)


def _notes(base: BaseWeights, tuned: BaseWeights, changed: Mapping[str, Factors]) -> tuple[str, ...]:
    notes: list[str] = []
    dtypes = Counter((base.layers[name].dtype, tuned.layers[name].dtype) for name in changed)
    if mixed := [pair for pair in dtypes if pair[0] != pair[1]]:
        notes.append(
            f"the base is stored as {mixed[0][0]}, the tuned model as {mixed[0][1]}: differences as small as the "
            "coarser one's steps are rounding, not training"
        )
    for one, other in ((base, tuned), (tuned, base)):
        differing = [
            name
            for name, place in one.others.items()
            if name.partition(".")[0] in PARTS
            and (name not in other.others or (one is base and other.others[name].shape != place.shape))
        ]
        if differing:
            notes.append(
                f"{len(differing)} tensors of {one.path} are missing or of another shape in {other.path} and were not "
                f"compared, such as {differing[0]}"
            )
    return tuple(notes)


def _record(base: BaseWeights, tuned: BaseWeights, settings: ExtractSettings) -> dict[str, object]:
    record: dict[str, object] = {
        "command": "extract",
        "base": model_name(base.path),
        "tuned": model_name(tuned.path),
        "rank": settings.rank,
    }
    optional = {"conv_rank": settings.conv_rank, "energy": settings.energy}
    return record | {key: value for key, value in optional.items() if value is not None}


def kept_by_part(layers: Sequence[ExtractedLayer]) -> dict[str, float]:
    """Part → share of its layers' squared change that was kept."""
    squared: dict[str, float] = {}
    kept: dict[str, float] = {}
    for layer in layers:
        part = part_of(layer.name)
        squared[part] = squared.get(part, 0.0) + layer.squared
        kept[part] = kept.get(part, 0.0) + layer.squared - layer.lost
    return {part: kept[part] / total if total and math.isfinite(total) else 0.0 for part, total in squared.items()}
