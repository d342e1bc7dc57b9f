"""What an adapter file holds, told without a base: layers, ranks, size of the change, metadata, and who can read it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_diffusion.adapters.geometry import ALPHA
from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.files import sha256_of
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.layout import Layout, layout_of
from lora_diffusion.formats.metadata import tensor_hash
from lora_diffusion.progress import Track, silent
from lora_diffusion.tools.charts import bar_panels, block_of, in_order
from lora_diffusion.tools.deltas import change_in
from lora_diffusion.tools.low_rank import effective_rank, singular_values_of_factors
from lora_diffusion.tools.readers import FileFacts, Reading, spelling_of_blocks, what_readers_do

OTHER_BLOCK = "other"
"""Where modules are counted that no Stable Diffusion model has."""

_COMPONENTS = {"lora_unet": "UNet", "lora_te": "text encoder", "lora_te1": "text encoder", "lora_te2": "text encoder 2"}


@dataclass(frozen=True)
class Spread:
    """Values over the modules of a part: smallest, largest, the most frequent one, and in what share of them it is."""

    least: float
    most: float
    common: float
    share: float


@dataclass(frozen=True)
class PartSummary:
    """The modules of one component. scale: alpha / rank, 1 where nothing is factored."""

    name: str
    num_modules: int
    kinds: dict[str, int]
    rank: Spread
    alpha: Spread
    scale: Spread


@dataclass(frozen=True)
class BlockSummary:
    """norm: ‖ΔW‖, Frobenius, of all modules of a block together. effective_rank: the mean over them."""

    num_modules: int
    norm: float
    effective_rank: float


@dataclass(frozen=True)
class Inspection:
    """Everything that `lora-diffusion inspect` tells. bytes: of the file.

    spelling: of the UNet's blocks in a kohya file. is_direction: blocks tell of DoRA, where the change is rescaled
    with the weight, and this is the change before that. stored_hash: `sshs_model_hash`, "" if there is none.
    """

    file: str
    bytes: int
    format: str
    spelling: str
    family: str
    kinds: dict[str, int]
    dtypes: dict[str, int]
    parts: tuple[PartSummary, ...]
    blocks: dict[str, BlockSummary]
    is_direction: bool
    metadata: dict[str, str]
    sha256: str
    stored_hash: str
    computed_hash: str
    notes: tuple[str, ...]
    readers: dict[str, Reading]

    @property
    def is_hash_false(self) -> bool:
        """Whether the file holds other tensors than those that its hash was made of."""
        return bool(self.stored_hash) and self.stored_hash != self.computed_hash

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"is_hash_false": self.is_hash_false}, indent=2)


def inspect_file(path: Path, track: Track = silent) -> Inspection:
    """Reads the file and measures every module's change. Raises AdapterFileError if it is no adapter."""
    file = AdapterFile.read(path)
    header = read_header(path)
    layout = layout_of(path, header)
    facts = facts_of(file, layout)
    return Inspection(
        file=str(path),
        bytes=path.stat().st_size,
        format=_format_name(facts),
        spelling=spelling_of_blocks(facts),
        family=file.family,
        kinds=dict(file.kinds),
        dtypes=dict(Counter(info.dtype for info in header.tensors.values())),
        parts=_parts(file),
        blocks=_blocks(file, track),
        is_direction=any(geometry.dora_axis is not None for geometry in file.geometries.values()),
        metadata=dict(file.metadata),
        sha256=sha256_of(path),
        stored_hash=file.metadata.get("sshs_model_hash", ""),
        computed_hash=tensor_hash(path.read_bytes()),
        notes=file.notes,
        readers=what_readers_do(facts),
    )


def facts_of(file: AdapterFile, layout: Layout) -> FileFacts:
    """What the table of readers asks about a file."""
    return FileFacts(
        format=file.format,
        family=file.family,
        keys=layout.modules,
        shapes={n: {part: tuple(t.shape) for part, t in parts.items()} for n, parts in file.modules.items()},
        geometries=file.geometries,
        alphas={name: parts[ALPHA].item() for name, parts in file.modules.items()},
        unread=file.unread,
    )


def plot_inspection(report: Inspection, path: Path) -> None:
    """Write a PNG with the norm and the effective rank of each block. Raises UserError if no block is known."""
    blocks = {name: block for name, block in report.blocks.items() if name != OTHER_BLOCK}
    if not blocks:
        raise UserError(f"{report.file}: none of its modules lies in a block of Stable Diffusion; nothing to plot.")
    what = "direction before rescaling (DoRA)" if report.is_direction else "change of the weights"
    panels = {
        "norm ‖ΔW‖": {name: block.norm for name, block in blocks.items()},
        "effective rank": {name: block.effective_rank for name, block in blocks.items()},
    }
    bar_panels(path, f"{Path(report.file).stem}: {what}, by block", panels)


def _format_name(facts: FileFacts) -> str:
    keys = [key for keys in facts.keys.values() for key in keys.values()]
    if facts.format == "peft" and not any(".lora_A." in key for key in keys):
        return "older diffusers"
    return {"kohya": "kohya", "peft": "PEFT", "positional": "numbered (2022)"}[facts.format]


def _parts(file: AdapterFile) -> tuple[PartSummary, ...]:
    members: dict[str, list[str]] = {}
    for name in file.modules:
        prefix = "_".join(name.split("_", 2)[:2])
        members.setdefault(_COMPONENTS.get(prefix, prefix), []).append(name)
    order = {component: number for number, component in enumerate(_COMPONENTS.values())}
    return tuple(_part(file, part, members[part]) for part in sorted(members, key=lambda part: order.get(part, 9)))


def _part(file: AdapterFile, part: str, names: Sequence[str]) -> PartSummary:
    ranks = {name: file.geometries[name].rank for name in names}
    alphas = {name: file.modules[name][ALPHA].item() for name in names}
    return PartSummary(
        name=part,
        num_modules=len(names),
        kinds=dict(Counter(file.geometries[name].name for name in names)),
        rank=_spread(list(ranks.values())),
        alpha=_spread(list(alphas.values())),
        scale=_spread([alphas[name] / ranks[name] if ranks[name] else 1.0 for name in names]),
    )


def _spread(values: Sequence[float]) -> Spread:
    ((common, count),) = Counter(values).most_common(1)
    return Spread(min(values), max(values), common, count / len(values))


def _blocks(file: AdapterFile, track: Track) -> dict[str, BlockSummary]:
    norms: dict[str, list[float]] = {}
    ranks: dict[str, list[float]] = {}
    for name in track(list(file.modules), "singular values"):
        s = singular_values_of_factors(*change_in(file, name, direction_only=True))
        block = known_block(name)
        norms.setdefault(block, []).append(float(s.square().sum()))
        ranks.setdefault(block, []).append(effective_rank(s))
    return {
        block: BlockSummary(len(norms[block]), math.sqrt(sum(norms[block])), sum(ranks[block]) / len(ranks[block]))
        for block in ordered(norms)
    }


def known_block(name: str) -> str:
    """`block_of`, or `OTHER_BLOCK` for a module of another model."""
    try:
        return block_of(name)
    except ValueError:
        return OTHER_BLOCK


def ordered(blocks: Mapping[str, object]) -> list[str]:
    """Labels of `known_block` in the order of the model, the unknown one last."""
    return in_order(set(blocks) - {OTHER_BLOCK}) + [OTHER_BLOCK] * (OTHER_BLOCK in blocks)
