"""PEFT files: `lora_adapter_metadata` says rank and alpha, as diffusers 0.34 writes it; few have alpha tensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, DOWN, UP
from lora_diffusion.adapters.lora import whole_down
from lora_diffusion.formats.layout import AdapterFileError
from lora_diffusion.formats.names import PEFT_PREFIXES, peft_module, peft_name

MAGNITUDES = "lora_magnitude_vector"
METADATA_KEY = "lora_adapter_metadata"
MAX_METADATA_CHARS = 1_000_000
_ADAPTER_CONFIG = "adapter_config.json"  # beside files that PEFT itself saved
_PEFT_ROOT = "base_model.model."

Modules = Mapping[str, Mapping[str, Tensor]]


def peft_tensors(path: Path | None, modules: Modules, kinds: Collection[str]) -> dict[str, Tensor]:
    """PEFT key → tensor, with the very numbers of the factors; alpha goes into `peft_metadata`.

    Raises AdapterFileError naming what PEFT's LoRA cannot hold.
    """
    if others := set(kinds) - {"lora", "dora"}:
        raise AdapterFileError(
            f"{path or 'This adapter'}: PEFT files hold LoRA only, not {', '.join(sorted(others))}. Keep the kohya "
            "format, or make a LoRA of it first with `lora-diffusion resize`."
        )
    tensors: dict[str, Tensor] = {}
    has_magnitudes: dict[str, bool] = {}
    for name, parts in modules.items():
        try:
            module = peft_name(name)
        except ValueError as error:
            raise AdapterFileError(f"{path}: no PEFT name for this module: {error}.") from None
        component = module.partition(".")[0]
        if has_magnitudes.setdefault(component, DORA_SCALE in parts) != (DORA_SCALE in parts):
            raise AdapterFileError(
                f"{path or 'This adapter'}: some modules of its {component} are DoRA and some, such as {name}, are "
                "not; a PEFT file can only say so of all together. Keep the kohya format."
            )
        tensors[f"{module}.lora_A.weight"] = whole_down(parts)
        tensors[f"{module}.lora_B.weight"] = parts[UP]
        if DORA_SCALE in parts:
            scale = parts[DORA_SCALE]
            if scale.shape[0] == 1:
                raise AdapterFileError(
                    f"{path or 'This adapter'}: {name} has DoRA magnitudes per input, PEFT's DoRA has them per output: "
                    "no PEFT file can hold it. Keep the kohya format."
                )
            flat = scale.flatten() if scale.ndim == 2 else scale.reshape(1, -1, 1, 1)
            tensors[f"{module}.{MAGNITUDES}"] = flat
    return tensors


def peft_metadata(modules: Modules) -> dict[str, str]:
    """`lora_adapter_metadata` for these modules: only the fields that a reader needs, for every component there is."""
    config: dict[str, Any] = {}
    by_component: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for name, parts in modules.items():
        component, _, path = peft_name(name).partition(".")
        by_component.setdefault(component, {})[path.removeprefix("text_model.")] = parts
    for component, members in by_component.items():
        ranks = {path: parts[DOWN].shape[0] for path, parts in members.items()}
        alphas = {path: parts[ALPHA].item() for path, parts in members.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        # A longer path comes first: PEFT takes the first pattern that the end of a module's path matches.
        ordered = sorted(members, key=len, reverse=True)
        config |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": alpha,
            f"{component}.rank_pattern": {path: ranks[path] for path in ordered if ranks[path] != rank},
            f"{component}.alpha_pattern": {path: alphas[path] for path in ordered if alphas[path] != alpha},
            f"{component}.target_modules": sorted(members),
            f"{component}.use_dora": all(DORA_SCALE in parts for parts in members.values()),
            f"{component}.use_rslora": False,
            f"{component}.lora_bias": False,
        }
    return {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def peft_alphas(
    path: Path, ranks: Mapping[str, int], modules: Mapping[str, Mapping[str, str]], metadata: Mapping[str, str]
) -> dict[str, float]:
    """Alpha by canonical module name, for the modules in `ranks`; alpha = rank if the file says nothing.

    ranks: of the modules without an alpha tensor; where there is one it counts, as in ComfyUI. Raises AdapterFileError
    if the metadata is there but unreadable, silent about a component, or contradicts the tensors: the scale cannot be
    known then. The same for a file of PEFT itself without its `adapter_config.json`.
    """
    if METADATA_KEY in metadata:
        config = _of_every_component(_parse(path, metadata[METADATA_KEY]))
    elif any(key.startswith(_PEFT_ROOT) for name in ranks for key in modules[name].values()):
        config = _adapter_config(path)
    else:
        return {name: float(rank) for name, rank in ranks.items()}
    return {name: _alpha(path, name, next(iter(modules[name].values())), rank, config) for name, rank in ranks.items()}


def _adapter_config(path: Path) -> dict[str, Any]:
    """The config that PEFT saves beside its file, as if it were metadata of every component."""
    beside = path.with_name(_ADAPTER_CONFIG)
    try:
        settings = _parse(path, beside.read_text(encoding="utf-8"))
    except OSError:
        raise AdapterFileError(
            f"{path}: PEFT saved this file, and its strength is in {_ADAPTER_CONFIG}, which is not beside it. Put the "
            "two together."
        ) from None
    return _of_every_component(settings)


def _of_every_component(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a single model, whose keys name no component, as if it were that of each."""
    if "r" not in config:
        return config
    return {f"{part}.{key}": value for part in set(PEFT_PREFIXES.values()) for key, value in config.items()}


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


def _alpha(path: Path, name: str, key: str, rank: int, config: Mapping[str, Any]) -> float:
    """key: of any tensor of the module `name`."""
    component, module = peft_module(key)
    claimed = _setting(path, config, component, module, "r", "rank_pattern")
    alpha = _setting(path, config, component, module, "lora_alpha", "alpha_pattern")
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
