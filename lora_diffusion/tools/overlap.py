"""How far adapters move a model the same way: the cosines of the angles between their weight changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.progress import Track, silent
from lora_diffusion.tools.charts import heat_map
from lora_diffusion.tools.convert import with_usual_names
from lora_diffusion.tools.deltas import change_in, refuse_dora
from lora_diffusion.tools.inspect import OTHER_BLOCK, known_block, ordered
from lora_diffusion.tools.low_rank import inner_product

ALIKE = 0.5
"""A cosine above which two adapters are said to move the same directions: together they act like one of them, stronger.
Independent changes of so many weights have a cosine near 0."""

Matrix = list[list[float]]


@dataclass(frozen=True)
class Overlap:
    """whole, by_block: cosine per pair, in the order of `names`; NaN where one of the two changes nothing."""

    names: tuple[str, ...]
    whole: Matrix
    by_block: dict[str, Matrix]

    @property
    def alike(self) -> list[tuple[str, str, float]]:
        """Pairs that move the same directions, with their cosine."""
        return [
            (self.names[i], self.names[j], self.whole[i][j])
            for j in range(len(self.names))
            for i in range(j)
            if self.whole[i][j] > ALIKE
        ]

    def to_json(self) -> str:
        """NaN, which JSON lacks, becomes null."""
        report = {
            "names": self.names,
            "whole": _with_null(self.whole),
            "by_block": {block: _with_null(matrix) for block, matrix in self.by_block.items()},
            "alike": self.alike,
            "alike_above": ALIKE,
        }
        return json.dumps(report, indent=2)


def overlap_of_files(paths: Sequence[Path], track: Track = silent) -> Overlap:
    """Pairwise cosines of ΔW. A module that only one of two adapters has counts as zero in the other.

    Raises UserError for fewer than two files, files of different families or layer sizes, and DoRA.
    """
    if len(paths) < 2:
        raise UserError("overlap compares adapters: give two files or more.")
    files = [with_usual_names(AdapterFile.read(path)) for path in paths]
    for file in files:
        refuse_dora(file, "compare")
    _check_same_model(files)
    modules = sorted({name for file in files for name in file.modules})
    grams: dict[str, torch.Tensor] = {}
    for name in track(modules, "comparing"):
        gram = grams.setdefault(known_block(name), torch.zeros(len(files), len(files), dtype=torch.float64))
        factors = {number: change_in(file, name) for number, file in enumerate(files) if name in file.modules}
        for i in factors:
            for j in factors:
                if j <= i:
                    product = inner_product(*factors[i], *factors[j])
                    gram[i, j] += product
                    if i != j:
                        gram[j, i] += product
    total = torch.stack(list(grams.values())).sum(0)
    return Overlap(_labels(paths), _cosines(total), {block: _cosines(grams[block]) for block in ordered(grams)})


def plot_overlap(overlap: Overlap, path: Path) -> None:
    """Write a PNG: one large heat map over all modules, a small one for each block."""
    by_block: Mapping[str, Matrix] = {name: m for name, m in overlap.by_block.items() if name != OTHER_BLOCK}
    heat_map(path, "cosine of the weight changes", overlap.names, overlap.whole, by_block)


def _check_same_model(files: Sequence[AdapterFile]) -> None:
    first = files[0]
    for file in files[1:]:
        if first.family and file.family and first.family != file.family:
            raise UserError(
                f"{file.path} is made for {FAMILY_NAMES[file.family]}, {first.path} for {FAMILY_NAMES[first.family]}: "
                "their layers have nothing in common. Compare adapters of one family."
            )
        for name in first.modules.keys() & file.modules.keys():
            one, other = first.geometries[name], file.geometries[name]
            if (one.outputs, one.inputs) != (other.outputs, other.inputs):
                raise UserError(
                    f"{file.path}: {name} is made for a layer of {other.outputs} x {other.inputs}, in {first.path} for "
                    f"one of {one.outputs} x {one.inputs}. Compare adapters of one model."
                )


def _cosines(gram: torch.Tensor) -> Matrix:
    lengths = gram.diagonal().clamp(min=0).sqrt()
    return (gram / (lengths[:, None] * lengths[None, :])).clamp(-1, 1).tolist()


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """File names without ending; with their place in the list where two are the same."""
    stems = [path.stem for path in paths]
    return tuple(f"{stem} ({i})" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems, 1))


def _with_null(matrix: Matrix) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in matrix]
