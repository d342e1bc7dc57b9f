"""What the names and shapes in an adapter file mean, and every reason to refuse it that needs no weights.

Names from a file are only ever compared and looked up in dicts; none is followed into an object or a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, PARTS, Geometry, geometry_of
from lora_diffusion.container import Header, TensorInfo
from lora_diffusion.errors import UserError
from lora_diffusion.formats.families import FAMILY_NAMES, cross_widths, family_of_metadata, family_of_tensors
from lora_diffusion.formats.names import canonical_name, from_peft_key
from lora_diffusion.formats.positional import POSITIONAL_KEY, place_of_positional_key

Format = Literal["kohya", "peft"]
"""What can be written."""
FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
"""What an alpha may be as well: diffusers' converter to kohya files writes the rank as an int64."""

_PLAIN_NAME = re.compile(r"[\w.:<>* -]{1,300}", re.ASCII)
_KOHYA_KEY = re.compile(r"((?:lora_(?:unet|te|te1|te2)|lycoris)_\w+)\.([\w.]+)", re.ASCII)
_OTHER_KINDS = (
    ("oft_", "OFT"),
    ("a1", "GLoRA"),
    ("a2", "GLoRA"),
    ("b1", "GLoRA"),
    ("b2", "GLoRA"),
    ("on_input", "IA3"),
    ("w_norm", "trained norm layers"),
    ("b_norm", "trained norm layers"),
    ("diff", "full weight differences"),
)
_FORMAT_NAMES = {"kohya": "kohya", "peft": "PEFT", "positional": "numbered"}
_NOT_ADAPTERS = (
    (("model.diffusion_model.", "first_stage_model.", "conditioner."), "a full checkpoint; use it as model.path"),
    (("down_blocks.", "encoder.down_blocks.", "text_model."), "a part of a base model"),
    (("emb_params", "string_to_param", "clip_l", "clip_g", "<"), "a textual inversion embedding"),
    (("transformer.", "diffusion_model.", "lora_transformer"), "made for a transformer model such as FLUX or SD3"),
    (("control_model.", "controlnet_"), "a ControlNet"),
)


class AdapterFileError(UserError):
    """An adapter file cannot be used: damaged, of another kind, or made for another model."""


@dataclass(frozen=True)
class Layout:
    """Where an adapter's tensors are.

    format: "kohya", "peft", or "positional" for the numbered files of 2022. family: "sd1", "sd2", "sdxl", or "" if
    neither tensors nor metadata tell. modules: canonical module name → part ("lora_down.weight", …) → key in the file.
    unread: the other keys, escaped for messages, as they may hold anything.
    """

    format: str
    family: str
    modules: Mapping[str, Mapping[str, str]]
    geometries: Mapping[str, Geometry]
    unread: tuple[str, ...]


def layout_of(path: Path, header: Header) -> Layout:
    """The layout of an adapter file; AdapterFileError names the key and the reason if it is not one or inconsistent."""
    tensors = header.tensors
    found, unread = _group(path, tensors, family_of_metadata(header.metadata) == "sdxl")
    if len(found) > 1:
        examples = [f"{_FORMAT_NAMES[it]} names ({_first_key(modules)})" for it, modules in found.items()]
        raise AdapterFileError(
            f"{path}: mixes {' and '.join(examples)}; which of them counts is not defined. Keep one of them."
        )
    if not found:
        raise AdapterFileError(f"{path}: not an adapter file: {_what_it_is(tensors)}.")
    ((format, modules),) = found.items()
    geometries = {
        name: _check_module(path, name, {part: tensors[key] for part, key in keys.items()}, format)
        for name, keys in modules.items()
    }
    return Layout(format, _family(path, geometries, header.metadata), modules, geometries, tuple(map(_shown, unread)))


def _first_key(modules: Mapping[str, Mapping[str, str]]) -> str:
    return next(key for keys in modules.values() for key in keys.values())


def _family(path: Path, geometries: Mapping[str, Geometry], metadata: Mapping[str, str]) -> str:
    shown, claimed = family_of_tensors(geometries), family_of_metadata(metadata)
    if shown and claimed and shown != claimed:
        raise AdapterFileError(
            f"{path}: its tensors are made for {FAMILY_NAMES[shown]} (cross-attention width "
            f"{max(cross_widths(geometries), default='unknown')}), its metadata says {FAMILY_NAMES[claimed]}. One of "
            "the two is from another file; get it again."
        )
    return shown or claimed


def _group(
    path: Path, tensors: Mapping[str, TensorInfo], is_sdxl: bool
) -> tuple[dict[str, dict[str, dict[str, str]]], list[str]]:
    """(format → module → part → key, the keys that belong to no module)."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    unread: list[str] = []
    two_encoders = is_sdxl or any(
        key.startswith(("text_encoder_2.", "base_model.model.text_encoder_2."))
        or (key.endswith("attn2.to_k.lora_A.weight") and info.shape[-1:] == (2048,))
        for key, info in tensors.items()
    )
    for key in tensors:
        place = _place(key, two_encoders)
        if place is not None or key.startswith(("lora_", "lycoris_")) or ".lora_" in key:
            _check_name(path, key)
        if place is None and (_KOHYA_KEY.fullmatch(key) or ".lora_" in key or POSITIONAL_KEY.fullmatch(key)):
            raise _unknown_kind(path, key)
        if place is None:
            unread.append(key)
            continue
        format, name, part = place
        parts = found.setdefault(format, {}).setdefault(name, {})
        if part in parts:
            raise AdapterFileError(f"{path}: {key} and {parts[part]} name the same tensor. Keep one of them.")
        parts[part] = key
    for key in unread:
        if _is_of_a_module(key, found, two_encoders):
            _check_name(path, key)
            raise _unknown_kind(path, key)
    return found, unread


def _check_name(path: Path, key: str) -> None:
    """Refuses what no program calls a tensor of a module; other tensors, such as bundled embeddings, are named freely.

    Only called for keys that are read, or that look as if they should be.
    """
    if not _PLAIN_NAME.fullmatch(key) or "__" in key or ".." in key:
        raise AdapterFileError(f"{path}: {key[:80]!r} cannot be a tensor's name. The file is damaged or forged.")


def _shown(key: str) -> str:
    """A key for messages: without line breaks, control characters and letters that a terminal may lack."""
    return key[:300].encode("unicode_escape").decode("ascii")[:300]


def _is_of_a_module(key: str, found: Mapping[str, Mapping[str, object]], two_encoders: bool) -> bool:
    """Whether the name of a module of the file is what `key` begins with, "….to_k" of "….to_k.diff_b"."""
    places = [_place(f"{key.rsplit('.', steps)[0]}.{ALPHA}", two_encoders) for steps in (1, 2)]
    return any(place is not None and place[1] in found.get(place[0], {}) for place in places)


def _place(key: str, two_encoders: bool) -> tuple[str, str, str] | None:
    """(format, canonical module name, part) of a key that we read."""
    match = _KOHYA_KEY.fullmatch(key)
    if match and match[2] in PARTS:
        return "kohya", canonical_name(match[1]), match[2]
    if peft := from_peft_key(key, two_encoders=two_encoders):
        return "peft", *peft
    numbered = place_of_positional_key(key)
    return ("positional", *numbered) if numbered else None


def _unknown_kind(path: Path, key: str) -> AdapterFileError:
    """A module's tensor that we do not read changes what the module does, so leaving it out is not an option."""
    last = key.rsplit(".", 2)[-2:]
    kind = next((kind for start, kind in _OTHER_KINDS if any(step.startswith(start) for step in last)), None)
    if kind is None:
        return AdapterFileError(f"{path}: {key} is no part of an adapter that this version knows.")
    return AdapterFileError(f"{path}: {key} belongs to {kind}; this version reads LoRA, DoRA, LoHa and LoKr files.")


def _what_it_is(tensors: Mapping[str, TensorInfo]) -> str:
    for starts, what in _NOT_ADAPTERS:
        if any(key.startswith(starts) for key in tensors):
            return f"it is {what}"
    if not tensors:
        return "it holds no tensors"
    first = _shown(", ".join(list(tensors)[:3]))[:200]
    return f"none of its {len(tensors)} tensors is named like one (the first: {first})"


def _check_module(path: Path, name: str, parts: Mapping[str, TensorInfo], format: str) -> Geometry:
    for part, info in parts.items():
        if info.dtype not in (FLOATS + INTEGERS if part == ALPHA else FLOATS):
            raise AdapterFileError(
                f"{path}: {name}.{part} is {info.dtype}; an adapter's weights are {', '.join(FLOATS)}."
            )
    try:
        return geometry_of({part: _shape(part, info, format) for part, info in parts.items()})
    except ValueError as error:
        raise AdapterFileError(
            f"{path}: {name}: {error}. The file is damaged, incomplete or mixes two adapters; get it again."
        ) from None


def _shape(part: str, info: TensorInfo, format: str) -> tuple[int, ...]:
    return magnitude_shape(info.shape) if part == DORA_SCALE and format == "peft" else info.shape


def magnitude_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT keeps magnitudes per output as (out,) or (1, out, 1, 1); kohya files as (out, 1) or (out, 1, 1, 1)."""
    if len(shape) == 1:
        return (shape[0], 1)
    return (shape[1], 1, *shape[2:]) if len(shape) == 4 else shape
