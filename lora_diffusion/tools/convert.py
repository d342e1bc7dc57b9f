"""Adapter files in other names, with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from lora_diffusion.adapters.geometry import ALPHA, MID
from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.formats.layout import Format, layout_of
from lora_diffusion.formats.metadata import BASE_VERSIONS
from lora_diffusion.formats.names import usual_name
from lora_diffusion.tools.inspect import facts_of
from lora_diffusion.tools.outputs import check_output
from lora_diffusion.tools.readers import Reading, what_readers_do

DTYPES: dict[str, torch.dtype | None] = {
    "same": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Conversion:
    """What became of a file. notes: what was odd in the source or is not in the target. bytes: before and after."""

    num_modules: int
    formats: tuple[str, str]
    bytes: tuple[int, int]
    notes: tuple[str, ...]
    readers: dict[str, Reading]


def convert_file(
    source: Path, target: Path, format: str, *, precision: str = "same", overwrite: bool = False
) -> Conversion:
    """Writes `source` as `target` in the names of `format`, every weight as it is unless `precision` says otherwise.

    format: "kohya" or "peft". precision: "same", "fp16", "bf16" or "fp32". Raises UserError for other values, for a
    target that may not be written and for what the format cannot hold, RunError where a value does not fit.
    """
    if format not in get_args(Format):
        raise UserError(f"--format {format}: write kohya or peft.")
    if precision not in DTYPES:
        raise UserError(f"--precision {precision}: write one of {', '.join(DTYPES)}.")
    check_output(target, [source], overwrite=overwrite)
    file = AdapterFile.read(source)
    notes = list(file.notes)
    usual = with_usual_names(file)
    if renamed := len(usual.modules.keys() - file.modules.keys()):
        notes.append(f"{renamed} modules of a text encoder had a rarer name, and now have the usual one")
    cores = sum(MID in parts for parts in file.modules.values())
    if cores and format == "peft":
        notes.append(f"the Tucker cores of {cores} convolutions are multiplied into their other factor")
    missing = sum(ALPHA not in keys for keys in layout_of(source, read_header(source)).modules.values())
    if missing and file.format == "kohya":
        notes.append(f"{missing} modules had no alpha; it is written as their rank, which every reader assumes")
    usual.write(target, format="peft" if format == "peft" else "kohya", dtype=DTYPES[precision])
    written = AdapterFile.read(target)
    return Conversion(
        num_modules=len(file.modules),
        formats=(file.format, format),
        bytes=(source.stat().st_size, target.stat().st_size),
        notes=tuple(notes),
        readers=what_readers_do(facts_of(written, layout_of(target, read_header(target)))),
    )


def with_usual_names(file: AdapterFile) -> AdapterFile:
    """The same adapter with the module names that every reader knows, and metadata that tells its family.

    Raises AdapterFileError if a module is there under two names.
    """
    modules = {usual_name(name, file.family): parts for name, parts in file.modules.items()}
    if len(modules) != len(file.modules):
        raise AdapterFileError(f"{file.path}: a module of the text encoder has two names. Keep one of them.")
    metadata = dict(file.metadata)
    if file.family:
        metadata.setdefault("ss_base_model_version", BASE_VERSIONS[file.family])
    return AdapterFile(modules, metadata, file.format, file.family, file.path, file.unread, file.notes)
