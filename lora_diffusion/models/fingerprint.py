"""Recognises the weights of a base again, wherever they lie, without reading them all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.container import read_header, weight_files, weight_stem

_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096


def fingerprint(source: Path, parts: Sequence[str]) -> dict[str, str]:
    """Part → a hash of its weight files; "checkpoint" → that of a single file.

    source: a diffusers folder with these `parts`, or a file. Hashed are the names, shapes and places of all tensors,
    and 1 MB of the values, taken evenly: a training that went on or a merge changes values everywhere. What keeps
    nearly all of them, such as one edited tensor, may go unnoticed. Raises ContainerError if a file is damaged.
    """
    if source.is_file():
        return {"checkpoint": _hash([source])}
    return {part: _hash(weight_files(source / part, weight_stem(part))) for part in parts}


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        header = read_header(path)
        digest.update(repr(sorted(header.tensors.items())).encode())
        num_bytes = path.stat().st_size - header.data_start
        with path.open("rb") as file:
            for index in range(_NUM_SAMPLES):
                file.seek(header.data_start + num_bytes * index // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
