"""What the names and shapes in an adapter file mean, and every reason to refuse it that needs no weights.

Names from a file are only ever compared and looked up in dicts; none is followed into an object or a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lora_diffusion.container import Header, TensorInfo
from lora_diffusion.errors import UserError
from lora_diffusion.formats.names import from_peft_key

Format = Literal["kohya", "peft"]
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
FLOATS = ("F16", "BF16", "F32", "F64")

FAMILY_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Width of the text conditioning, which every published model of the family has."""

_PLAIN_NAME = re.compile(r"[\w.:<>* -]{1,300}", re.ASCII)
_KOHYA_KEY = re.compile(r"(lora_(?:unet|te|te1|te2)_\w+)\.([\w.]+)", re.ASCII)
_OTHER_KINDS = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("lora_mid", "LoCon with a Tucker core"),
    ("oft_", "OFT"),
    ("diff", "full weight differences"),
)
_NOT_ADAPTERS = (
    (("model.diffusion_model.", "first_stage_model.", "conditioner."), "a full checkpoint; use it as model.path"),
    (("down_blocks.", "encoder.down_blocks.", "text_model."), "a part of a base model"),
    (("emb_params", "string_to_param", "clip_l", "clip_g", "<"), "a textual inversion embedding"),
    (("unet:", "text_encoder:"), "a positional LoRA file of 2022, which no current tool reads"),
    (("transformer.", "diffusion_model.", "lora_transformer"), "made for a transformer model such as FLUX or SD3"),
    (("control_model.", "controlnet_"), "a ControlNet"),
)


class AdapterFileError(UserError):
    """An adapter file cannot be used: damaged, of another kind, or made for another model."""


@dataclass(frozen=True)
class Layout:
    """Where an adapter's tensors are: kohya module name -> part ("lora_down.weight", …) -> key in the file."""

    format: Format
    modules: Mapping[str, Mapping[str, str]]
    unread: tuple[str, ...]


def layout_of(path: Path, header: Header) -> Layout:
    """The layout of a LoRA file; AdapterFileError names the key and the reason if it is not one, or is inconsistent."""
    tensors = header.tensors
    for key in tensors:
        if not _PLAIN_NAME.fullmatch(key) or "__" in key or ".." in key:
            raise AdapterFileError(f"{path}: {key[:80]!r} cannot be a tensor's name. The file is damaged or forged.")
    kohya, peft, unread = _group(path, tensors)
    if kohya and peft:
        raise AdapterFileError(
            f"{path}: mixes kohya names ({next(iter(kohya))}) and PEFT names ({next(iter(peft))}); "
            "which of the two counts is not defined. Keep one of them."
        )
    modules = kohya or peft
    if not modules:
        raise AdapterFileError(f"{path}: not a LoRA file: {_what_it_is(tensors)}.")
    for name, keys in modules.items():
        _check_module(path, name, {part: tensors[key] for part, key in keys.items()})
    return Layout("kohya" if kohya else "peft", modules, tuple(unread))


def made_for(modules: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Which family the modules of a file belong to, by what their names and shapes give away."""
    widths = {width for name, parts in modules.items() if (width := cross_width(name, parts[DOWN]))}
    if any("double_blocks" in name or "single_blocks" in name for name in modules):
        return "FLUX"
    if widths:
        return f"{FAMILY_WIDTHS.get(max(widths), 'a model')} (cross-attention width {max(widths)})"
    return "SDXL" if any(name.startswith("lora_te2_") for name in modules) else "another model"


def cross_width(name: str, weight: Tensor) -> int | None:
    """Channels of the text conditioning, if the module called `name` reads it; `weight` is its own or a down factor."""
    return weight.shape[1] if name.endswith("attn2_to_k") else None


def _group(
    path: Path, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], list[str]]:
    kohya: dict[str, dict[str, str]] = {}
    peft: dict[str, dict[str, str]] = {}
    unread: list[str] = []
    two_encoders = any(key.startswith("text_encoder_2.") for key in tensors)
    for key in tensors:
        match = _KOHYA_KEY.fullmatch(key)
        if match and match[2] in (DOWN, UP, ALPHA):
            kohya.setdefault(match[1], {})[match[2]] = key
        elif place := from_peft_key(key, two_encoders=two_encoders):
            parts = peft.setdefault(place[0], {})
            if place[1] in parts:
                raise AdapterFileError(f"{path}: {key} and {parts[place[1]]} name the same tensor. Keep one of them.")
            parts[place[1]] = key
        elif match or ".lora_" in key:
            _refuse_kind(path, key)
        else:
            unread.append(key)
    return kohya, peft, unread


def _refuse_kind(path: Path, key: str) -> None:
    """A module's tensor that we do not read changes what the module does, so leaving it out is not an option."""
    last = key.rsplit(".", 2)[-2:]
    kind = next((kind for start, kind in _OTHER_KINDS if any(step.startswith(start) for step in last)), None)
    if kind is None:
        raise AdapterFileError(f"{path}: {key} is no part of a LoRA that this version knows.")
    raise AdapterFileError(f"{path}: {key} belongs to {kind}; this version reads plain LoRA files.")


def _what_it_is(tensors: Mapping[str, TensorInfo]) -> str:
    for starts, what in _NOT_ADAPTERS:
        if any(key.startswith(starts) for key in tensors):
            return f"it is {what}"
    if not tensors:
        return "it holds no tensors"
    return f"none of its {len(tensors)} tensors is named like one (the first: {', '.join(list(tensors)[:3])[:200]})"


def _check_module(path: Path, name: str, parts: Mapping[str, TensorInfo]) -> None:
    if missing := [part for part in (DOWN, UP) if part not in parts]:
        raise AdapterFileError(f"{path}: {name} has no {missing[0]}. The file is incomplete; get it again.")
    down, up = parts[DOWN].shape, parts[UP].shape
    for part in (DOWN, UP):
        info = parts[part]
        if info.dtype not in FLOATS:
            raise AdapterFileError(f"{path}: {name}.{part} is {info.dtype}; a LoRA's weights are {', '.join(FLOATS)}.")
        if len(info.shape) not in (2, 4) or 0 in info.shape:
            raise AdapterFileError(
                f"{path}: {name}.{part} has shape {info.shape}; it should be a matrix (2 sizes) or a convolution (4), "
                "none of them 0. The file is damaged."
            )
    if len(down) != len(up) or up[2:] not in ((), (1, 1)):
        raise AdapterFileError(f"{path}: {name}: shapes {down} and {up} do not belong together. The file is damaged.")
    if down[0] != up[1]:
        raise AdapterFileError(
            f"{path}: {name}: {DOWN} has rank {down[0]}, {UP} has rank {up[1]}. The file is damaged or mixes two "
            "adapters; get it again."
        )
    if ALPHA in parts and parts[ALPHA].shape not in ((), (1,)):
        raise AdapterFileError(f"{path}: {name}.{ALPHA} has shape {parts[ALPHA].shape}; it should be one number.")
