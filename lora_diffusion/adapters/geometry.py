"""What the parts of one module in an adapter file are, by their names and shapes alone (no torch, no weights).

The part names are those of kohya and LyCORIS files; this package's parameters carry the same names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

DOWN, UP, MID, ALPHA, DORA_SCALE = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_TUCKER = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PARTS = frozenset((DOWN, UP, MID, ALPHA, DORA_SCALE, *LOHA, *LOHA_TUCKER, *LOKR))
"""Every part name that some kind of adapter has."""


@dataclass(frozen=True)
class Geometry:
    """The layer that a module's parts were made for.

    kind: "lora", "loha" or "lokr"; with `dora_axis` it is the inside of a DoRA. rank: of the factors, for LoKr that of
    the factored side, 0 if both are whole. outputs: rows of the weight. inputs: columns of the weight with the kernel
    flattened into them. dora_axis: 1 if the magnitudes are per input channel, 0 if per output, None without any.
    """

    kind: str
    rank: int
    outputs: int
    inputs: int
    dora_axis: int | None = None

    @property
    def name(self) -> str:
        """The kind as a config calls it: "dora" for a LoRA with magnitudes, "dora of loha" for the rarer ones."""
        if self.dora_axis is None:
            return self.kind
        return "dora" if self.kind == "lora" else f"dora of {self.kind}"


def kind_of(parts: Collection[str]) -> str | None:
    """The kind, "lora", "loha" or "lokr", by any one part that only this kind has."""
    for kind, names in (("lora", (DOWN, UP, MID)), ("loha", LOHA + LOHA_TUCKER), ("lokr", LOKR)):
        if any(part in names for part in parts):
            return kind
    return None


def geometry_of(parts: Mapping[str, Shape]) -> Geometry:
    """What the parts say together. Raises ValueError with the reason if they are not one whole, consistent module."""
    kind = kind_of(parts)
    if kind is None:
        raise ValueError(f"{', '.join(sorted(parts))} alone are no adapter")
    for part, shape in parts.items():
        if part not in (ALPHA, DORA_SCALE) and (len(shape) not in (2, 4) or 0 in shape):
            raise ValueError(
                f"{part} has shape {shape}; it should be a matrix (2 sizes) or a convolution (4), none of them 0"
            )
    if ALPHA in parts and parts[ALPHA] not in ((), (1,)):
        raise ValueError(f"{ALPHA} has shape {parts[ALPHA]}; it should be one number")
    geometry = {"lora": _lora, "loha": _loha, "lokr": _lokr}[kind](parts)
    foreign = parts.keys() - _own_parts(kind) - {ALPHA, DORA_SCALE}
    if foreign:
        raise ValueError(f"{sorted(foreign)[0]} does not belong to a {kind}")
    if DORA_SCALE in parts:
        return Geometry(geometry.kind, geometry.rank, geometry.outputs, geometry.inputs, _dora_axis(parts, geometry))
    return geometry


def _own_parts(kind: str) -> frozenset[str]:
    return frozenset({"lora": (DOWN, UP, MID), "loha": LOHA + LOHA_TUCKER, "lokr": LOKR}[kind])


def _need(parts: Mapping[str, Shape], names: Collection[str]) -> None:
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"{missing[0]} is missing")


def _agree(first: str, one: int, second: str, other: int) -> None:
    if one != other:
        raise ValueError(f"{first} has rank {one}, {second} has rank {other}")


def _lora(parts: Mapping[str, Shape]) -> Geometry:
    _need(parts, (DOWN, UP))
    down, up = parts[DOWN], parts[UP]
    if len(down) != len(up) or up[2:] not in ((), (1, 1)):
        raise ValueError(f"the shapes {down} and {up} do not belong together")
    _agree(DOWN, down[0], UP, up[1])
    if MID not in parts:
        return Geometry("lora", down[0], up[0], math.prod(down[1:]))
    mid = parts[MID]
    if len(mid) != 4 or mid[:2] != (down[0], down[0]) or down[2:] != (1, 1):
        raise ValueError(f"{MID} has shape {mid}; it does not belong between {down} and {up}")
    return Geometry("lora", down[0], up[0], down[1] * math.prod(mid[2:]))


def _loha(parts: Mapping[str, Shape]) -> Geometry:
    _need(parts, LOHA)
    if any(len(parts[name]) != 2 for name in LOHA):
        raise ValueError("the factors of a LoHa are matrices")
    halves: list[tuple[int, int]] = []
    for half, core in (("1", "hada_t1"), ("2", "hada_t2")):
        left, right = f"hada_w{half}_a", f"hada_w{half}_b"
        a, b = parts[left], parts[right]
        if core in parts:  # Tucker: (rank, outputs), (rank, inputs) around a core of (rank, rank, k, k)
            _agree(left, a[0], right, b[0])
            if len(parts[core]) != 4 or parts[core][:2] != (a[0], a[0]):
                raise ValueError(f"{core} has shape {parts[core]}; it does not belong between {a} and {b}")
            halves.append((a[1], b[1] * math.prod(parts[core][2:])))
        else:
            _agree(left, a[1], right, b[0])
            halves.append((a[0], b[1]))
    if halves[0] != halves[1]:
        raise ValueError(f"its halves make {halves[0]} and {halves[1]}, which cannot be multiplied entry by entry")
    rank = parts["hada_w1_b"][0]
    return Geometry("loha", rank, *halves[0])


def _lokr(parts: Mapping[str, Shape]) -> Geometry:
    sides: list[tuple[int, int]] = []
    rank = 0
    for side in ("lokr_w1", "lokr_w2"):
        left, right = f"{side}_a", f"{side}_b"
        if side in parts:
            if left in parts or right in parts:
                raise ValueError(f"{side} is there whole and factored; which of the two counts is not defined")
            sides.append((parts[side][0], math.prod(parts[side][1:])))
            continue
        if left not in parts and right not in parts:
            raise ValueError(f"{side} is missing")
        _need(parts, (left, right))
        a, b = parts[left], parts[right]
        if len(a) != 2 or len(b) != 2:
            raise ValueError("the factors of a LoKr are matrices")
        if side == "lokr_w2" and "lokr_t2" in parts:
            _agree(left, a[0], right, b[0])
            core = parts["lokr_t2"]
            if len(core) != 4 or core[:2] != (a[0], b[0]):
                raise ValueError(f"lokr_t2 has shape {core}; it does not belong between {a} and {b}")
            sides.append((a[1], b[1] * math.prod(core[2:])))
        else:
            _agree(left, a[1], right, b[0])
            sides.append((a[0], b[1]))
        rank = b[0]  # where both are factored, readers take the second
    if "lokr_t2" in parts and "lokr_w2" in parts:
        raise ValueError("lokr_t2 belongs to a factored lokr_w2")
    return Geometry("lokr", rank, sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])


def _dora_axis(parts: Mapping[str, Shape], geometry: Geometry) -> int:
    shape = parts[DORA_SCALE]
    if len(shape) in (2, 4) and shape[0] == geometry.outputs and math.prod(shape[1:]) == 1:
        return 0
    if len(shape) in (2, 4) and shape[0] == 1 and math.prod(shape[2:]) == 1 and geometry.inputs % shape[1] == 0:
        return 1
    raise ValueError(
        f"{DORA_SCALE} has shape {shape}; it should be (1, inputs) or (outputs, 1), for {geometry.outputs} outputs"
    )
