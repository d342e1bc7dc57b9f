"""Base models on disk: reads single layers, and writes copies in which some layers have changed.

Works on bytes and headers; no model is built, and one tensor at a time is in memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.container import (
    PICKLE_SUFFIXES,
    Header,
    header_of_entries,
    read_header,
    scaling_problem,
    weight_files,
    weight_stem,
)
from lora_diffusion.errors import RunError
from lora_diffusion.files import CHUNK_BYTES, sync_folder
from lora_diffusion.formats.checkpoint_layout import (
    BaseFileError,
    TensorPlace,
    layout_of_checkpoint,
    layout_of_folder,
)
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]
"""From a layer's weight W (float32) to what is added to it, ΔW, of the same shape."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Components of a diffusers folder that adapters change."""

DTYPES = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}

_FALSE_AFTER_A_CHANGE = ("modelspec.hash_sha256",)  # a hash of the weights


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base model on disk.

    family: "sd1", "sd2" or "sdxl". layers: name in adapter files, with the block names of diffusers, → the weight of
    that Linear or Conv2d ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1").
    others: norms, biases, embeddings and what else there is, by dotted name; a folder's VAE is not looked at.
    headers: the files that hold them.
    """

    path: Path
    family: str
    layers: Mapping[str, TensorPlace]
    others: Mapping[str, TensorPlace]
    headers: Mapping[Path, Header]

    @classmethod
    def open(cls, path: Path) -> BaseWeights:
        """Read the headers of a diffusers folder or single-file checkpoint.

        Raises UserError naming the file: missing, damaged, only pickled, scaled fp8, or no Stable Diffusion base.
        """
        if not path.is_dir():
            header = _header(path)
            layout = layout_of_checkpoint(path, header)
            return cls(path, layout.family, layout.layers, layout.others, {path: header})
        folders = {part: path / part for part in PARTS if part == "unet" or (path / part).is_dir()}
        parts = {
            part: {file: _header(file) for file in weight_files(folders[part], weight_stem(part))} for part in folders
        }
        layout = layout_of_folder(path, parts)
        headers = {file: header for files in parts.values() for file, header in files.items()}
        return cls(path, layout.family, layout.layers, layout.others, headers)

    def read(self, name: str) -> Tensor:
        """The tensor called `name` in `layers` or `others`, float32. Raises KeyError for any other name."""
        place = self.layers[name] if name in self.layers else self.others[name]
        if place.dtype not in DTYPES:
            raise BaseFileError(f"{place.file}: {place.key} is stored as {place.dtype}, which cannot be read here.")
        stored_shape = place.shape[::-1] if place.is_transposed else place.shape
        with place.file.open("rb") as file:
            tensor = _read_tensor(file, place.begin, stored_shape, DTYPES[place.dtype]).to(torch.float32)
        return tensor.T.contiguous() if place.is_transposed else tensor


def write_changed(
    base: BaseWeights,
    out: Path,
    changes: Mapping[str, Change],
    *,
    metadata: Mapping[str, str] | None = None,
    track: Track = silent,
) -> None:
    """Write a copy of `base`, in the same form, with `changes[name](W)` added to the weight of each layer named.

    The sum is computed in float32 and rounded once to the stored dtype. Every other tensor and file is copied byte for
    byte; names, order and dtypes stay. metadata: entries to add to the headers of the files that change.
    `out` appears whole or not at all. Raises UserError if it exists, if a layer is unknown, or if a weight is no longer
    finite in its stored dtype; RunError if the disk is full.
    """
    _check_out(base.path, out)
    if unknown := [name for name in changes if name not in base.layers]:
        raise BaseFileError(f"{base.path}: has no layer {unknown[0]} ({len(unknown)} of {len(changes)} are missing).")
    copy = _Copy(base, changes, metadata or {}, track)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".", suffix=".tmp") as temporary:
            written = Path(temporary) / out.name
            if base.path.is_dir():
                copy.write_folder(written)
            else:
                copy.write_file(base.path, written)
            _check_out(base.path, out)
            written.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise RunError(
            f"{out}: could not be written whole, and nothing was left there ({error}). Check the space on the disk and "
            "the permissions."
        ) from error


@dataclass(frozen=True)
class _Copy:
    base: BaseWeights
    changes: Mapping[str, Change]
    metadata: Mapping[str, str]
    track: Track

    def write_folder(self, out: Path) -> None:
        changed = {self.base.layers[name].file for name in self.changes}
        out.mkdir()
        for source in _regular_files(self.base.path):
            target = out / source.relative_to(self.base.path)
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
            if source in changed:
                self.write_file(source, target)
            else:
                with source.open("rb") as old, target.open("xb") as new:
                    shutil.copyfileobj(old, new, CHUNK_BYTES)
                    _sync(new)
                self._warn_if_outdated(source, changed)
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            sync_folder(folder)

    def write_file(self, source: Path, target: Path) -> None:
        """A safetensors file with the same table of tensors; those of the changed layers have new bytes."""
        header = self.base.headers[source]
        layers: dict[str, list[str]] = {}
        for name in self.changes:
            if (place := self.base.layers[name]).file == source:
                layers.setdefault(place.key, []).append(name)
        keys = sorted(header.tensors, key=lambda key: header.tensors[key].begin)
        with source.open("rb") as old, target.open("xb") as new:
            new.write(_header_bytes(old, header, self.metadata))
            for key in self.track(keys, f"Writing {target.name}"):
                info = header.tensors[key]
                if key not in layers:
                    old.seek(header.data_start + info.begin)
                    _copy_bytes(old, new, info.end - info.begin)
                    continue
                entry = _read_tensor(old, header.data_start + info.begin, info.shape, DTYPES[info.dtype])
                for name in layers[key]:
                    self._change(name, entry)
                new.write(entry.reshape(-1).view(torch.uint8).numpy().data)
            _sync(new)

    def _change(self, name: str, entry: Tensor) -> None:
        """Adds to the layer's rows of `entry`, in place."""
        place = self.base.layers[name]
        rows = entry if place.rows is None else entry[place.rows.start : place.rows.stop]
        if place.is_transposed:
            rows = rows.T
        weight = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        delta = self.changes[name](weight)
        if delta.shape != weight.shape:
            raise ValueError(f"the change of {name} has shape {tuple(delta.shape)}, its weight {tuple(weight.shape)}")
        total = weight + delta.to(torch.float32)
        limit = torch.finfo(entry.dtype).max
        if not (
            total.abs() <= limit
        ).all():  # before the rounding, which may stop at the limit in float8; NaN fails too
            raise BaseFileError(
                f"{place.file}: {place.key} would no longer be finite: values of up to {total.abs().max():.3g} where "
                f"{place.dtype} ends at {limit:.3g}. Lower the strength, look for damage in what is added, or use a "
                "float32 copy of the base. Nothing was written."
            )
        rows.copy_(total.to(entry.dtype))

    def _warn_if_outdated(self, source: Path, changed: set[Path]) -> None:
        """Other variants and pickles of a changed component still hold its old weights."""
        is_weights = source.suffix in (*PICKLE_SUFFIXES, ".safetensors", ".msgpack")
        is_beside = source.parent in {file.parent for file in changed} | {self.base.path}
        if is_weights and is_beside and source not in self.base.headers:
            logger.warning(
                "%s was copied as it is and holds the old weights; delete it from the copy if a program might load it",
                source.relative_to(self.base.path),
            )


def _header(file: Path) -> Header:
    header = read_header(file)
    if problem := scaling_problem(header):
        raise BaseFileError(f"{file}: {problem}")
    return header


def _check_out(source: Path, out: Path) -> None:
    if out.exists() or out.is_symlink():
        is_same = os.path.realpath(out) == os.path.realpath(source)
        what = "is the base itself, which is never changed" if is_same else "exists already and is not overwritten"
        raise BaseFileError(f"{out}: {what}. Give another name.")
    if not out.parent.is_dir():
        raise BaseFileError(f"{out}: the folder {out.parent} does not exist. Create it first.")
    if source.is_dir() == (out.suffix == ".safetensors"):
        form = "a folder, so the name must not end in" if source.is_dir() else "a file, so the name must end in"
        raise BaseFileError(f"{out}: the result is {form} .safetensors like the base {source}. Give another name.")
    if source.is_dir() and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise BaseFileError(f"{out}: lies inside the base {source}, which is never changed. Give a place outside it.")


def _regular_files(folder: Path) -> Iterator[Path]:
    """Files below `folder`, links to files among them (the hub's cache consists of those); pipes and the like not."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.is_symlink():
                raise BaseFileError(f"{path}: is a link to a folder and is not followed. Put the folder itself there.")
            yield from _regular_files(path)
        elif path.is_file():
            yield path
        else:
            logger.warning("%s is left out of the copy: it is no regular file, or a link that leads nowhere", path)


def _header_bytes(file: BufferedReader, header: Header, added: Mapping[str, str]) -> bytes:
    """The file's own header, with other metadata if that changes."""
    start = file.read(header.data_start)
    metadata = {key: value for key, value in header.metadata.items() if key not in _FALSE_AFTER_A_CHANGE} | dict(added)
    if metadata == header.metadata:
        return start
    entries = json.loads(start[8:])
    entries.pop("__metadata__", None)
    return header_of_entries(entries, metadata)


def _read_tensor(file: BufferedReader, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    data = bytearray(count * dtype.itemsize)
    file.seek(begin)
    if file.readinto(data) != len(data):
        raise OSError(f"{file.name} became shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _copy_bytes(old: BufferedReader, new: BufferedWriter, count: int) -> None:
    while count:
        piece = old.read(min(count, CHUNK_BYTES))
        if not piece:
            raise OSError(f"{old.name} became shorter while it was copied")
        new.write(piece)
        count -= len(piece)


def _sync(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
