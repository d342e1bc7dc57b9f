"""The scale of PEFT files, which have no alpha tensors: what their `lora_adapter_metadata` says, or none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.formats.layout import AdapterFileError
from lora_diffusion.formats.names import PEFT_PREFIXES, split_kohya_name

METADATA_KEY = "lora_adapter_metadata"
MAX_METADATA_CHARS = 1_000_000


def peft_alphas(path: Path, ranks: Mapping[str, int], metadata: Mapping[str, str]) -> dict[str, float]:
    """Alpha by kohya module name, for modules of the given ranks; alpha = rank if the file says nothing.

    Raises AdapterFileError if the metadata is there but unreadable, silent about a component, or contradicts the
    tensors: the scale cannot be known then.
    """
    if METADATA_KEY not in metadata:
        return {name: float(rank) for name, rank in ranks.items()}
    config = _parse(path, metadata[METADATA_KEY])
    return {name: _alpha(path, name, rank, config) for name, rank in ranks.items()}


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        if len(text) > MAX_METADATA_CHARS:
            raise ValueError(f"it has {len(text)} characters")
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise AdapterFileError(f"{path}: the metadata {METADATA_KEY} cannot be read: {reason}.") from None
    return config


def _alpha(path: Path, name: str, rank: int, config: Mapping[str, Any]) -> float:
    prefix, module = split_kohya_name(name)
    component = PEFT_PREFIXES[prefix]
    claimed = _setting(path, config, component, module, "r", "rank_pattern")
    alpha = _setting(path, config, component, module, "lora_alpha", "alpha_pattern")
    if config.get(f"{component}.use_dora"):
        raise AdapterFileError(f"{path}: its metadata says DoRA; this version reads plain LoRA files.")
    if claimed != rank:
        raise AdapterFileError(
            f"{path}: its metadata says rank {claimed:g} for {name}, the tensors have rank {rank}, so the scale cannot "
            "be known. Get the file again, or remove the metadata if it belongs to another file."
        )
    # rsLoRA divides alpha by the root of the rank (arXiv:2312.03732); kohya files always by the rank.
    return alpha * math.sqrt(rank) if config.get(f"{component}.use_rslora") else alpha


def _setting(path: Path, config: Mapping[str, Any], component: str, module: str, key: str, pattern_key: str) -> float:
    """A number that holds for the component, or the exception its pattern table makes for the module."""
    value = config.get(f"{component}.{key}")
    patterns = config.get(f"{component}.{pattern_key}") or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"{path}: {component}.{pattern_key} in its metadata is not a table.")
    for pattern, exception in patterns.items():
        if _matches(path, pattern, module):
            value = exception
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterFileError(f"{path}: its metadata gives {component}.{key} as {value!r}, not as a number.")
    return float(value)


def _matches(path: Path, pattern: str, module: str) -> bool:
    """Whether PEFT applies `pattern` to `module`: it names the end of the path, or all of it after a "^".

    PEFT compiles patterns as regular expressions; a file's are not compiled here (one can be made to run for ever),
    so anything but a plain path is refused.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", plain):
        raise AdapterFileError(f"{path}: the pattern {pattern[:80]!r} in its metadata is not a plain module path.")
    module, plain = module.removeprefix("text_model."), plain.removeprefix("text_model.")
    return module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}"))
