"""What tools decide about an adapter file they make: its precision, its metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import lora_diffusion
from lora_diffusion.container import valid_text
from lora_diffusion.errors import UserError
from lora_diffusion.formats.layout import Format
from lora_diffusion.formats.metadata import IMPLEMENTATIONS

MADE_BY = "lora_diffusion.made_by"
"""Metadata key of the record, as JSON, of what a file was made of and how."""

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}  # SD 2.x has several
_ABOUT_BASE = (
    *("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash"),
    *("modelspec.architecture", "modelspec.resolution", "modelspec.prediction_type", "modelspec.encoder_layer"),
)


def model_name(path: Path) -> str:
    """What to call a file or folder in metadata: no folders above it, which are private."""
    return valid_text(path.resolve().name.removesuffix(".safetensors"))


def resolve_format(name: str) -> Format:
    if name not in ("kohya", "peft"):
        raise UserError(f"--format {name}: there are kohya, which every program reads, and peft, for diffusers.")
    return name


def resolve_precision(name: str, stored: Collection[torch.dtype]) -> torch.dtype:
    """The dtype for a result of tensors that are stored so: "auto" is float32 if any is, bfloat16 if all are.

    Otherwise "auto" is float16, which has 8 times finer steps than bfloat16. Raises UserError for an unknown name.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise UserError(f"--precision {name}: there are auto, {', '.join(PRECISIONS)}.")
    if any(dtype in (torch.float32, torch.float64) for dtype in stored):
        return torch.float32
    return torch.bfloat16 if stored and all(dtype == torch.bfloat16 for dtype in stored) else torch.float16


def result_metadata(
    out: Path, family: str, inputs: Sequence[Mapping[str, str]], names: Sequence[str], record: Mapping[str, object]
) -> dict[str, str]:
    """Metadata of a file made from others: what all of them say about their base, and how it was made.

    Nothing about the training of one of them. inputs: their metadata. names: what to call them.
    """
    agreed = {key: inputs[0][key] for key in _ABOUT_BASE if inputs and key in inputs[0]}
    metadata = {key: text for key, text in agreed.items() if all(other.get(key) == text for other in inputs)}
    if family in _ARCHITECTURES:
        metadata["modelspec.architecture"] = f"{_ARCHITECTURES[family]}/lora"
    if architecture := metadata.get("modelspec.architecture"):
        implementation = IMPLEMENTATIONS.get(architecture.removesuffix("/lora"), "diffusers")
        metadata["modelspec.implementation"] = implementation
    phrases = [text for text in (other.get("modelspec.trigger_phrase") for other in inputs) if text]
    if phrases:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    if names:
        metadata["modelspec.merged_from"] = ", ".join(names)
    return metadata | {
        "ss_output_name": out.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation_version": f"lora-diffusion {lora_diffusion.__version__}",
        "modelspec.title": out.stem,
        "modelspec.date": datetime.now(UTC).replace(tzinfo=None, microsecond=0).isoformat(),
        MADE_BY: json.dumps(record),
    }
