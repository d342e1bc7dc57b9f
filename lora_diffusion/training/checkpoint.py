"""Checkpoints that are whole or not there: a folder of safetensors and JSON, published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_diffusion.errors import RunError
from lora_diffusion.files import sha256_of, sync_folder

ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_SPARE_FACTOR = 1.2  # free space wanted before a write, times its size: room for the manifest and other writers


class CheckpointError(RunError):
    """A checkpoint could not be written, or none could be read."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue bit for bit.

    adapter: the adapter's tensors, float32. optimizer: the optimiser's `state_dict`.
    facts: JSON values (config, data set fingerprint, loss scaler …). No random state: none exists.
    """

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/000200`, then remove all but the newest `keep` checkpoints. Returns the new folder.

    The files are written and fsynced in a temporary folder beside it, which a rename publishes: a crash at any
    instant leaves the old checkpoints or the old ones and the new one. Raises CheckpointError when the disk is
    full; the older checkpoints stay.
    """
    tensors, structure = _split_tensors(checkpoint.optimizer)
    files = {
        ADAPTER: save({k: v.detach().cpu().contiguous() for k, v in checkpoint.adapter.items()}),
        OPTIMIZER: save(tensors),
        STATE: _json({"step": checkpoint.step, "optimizer": structure, "facts": checkpoint.facts}),
    }
    target = folder / f"{checkpoint.step:06d}"
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, sum(map(len, files.values())))
        _write_folder(temporary, files)
        _publish(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target}: the checkpoint could not be written ({error}). {_remedy(folder)}") from error
    _rotate(folder, keep)
    return target


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest holds, and a line for each damaged one that was passed over."""
    passed_over: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return read_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def checkpoint_folders(folder: Path) -> list[Path]:
    """Published checkpoints in the order of their steps; temporary folders are not among them."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after comparing every file with the manifest. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, entry in manifest["files"].items():
            if sha256_of(path / name) != entry["sha256"]:
                raise CheckpointError(f"{path / name}: damaged, its content differs from {MANIFEST}.")
        state = json.loads((path / STATE).read_bytes())
        return Checkpoint(
            step=state["step"],
            adapter=load((path / ADAPTER).read_bytes()),
            optimizer=_join_tensors(state["optimizer"], load((path / OPTIMIZER).read_bytes())),
            facts=state["facts"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error}).") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes * _SPARE_FACTOR:
        raise CheckpointError(
            f"{folder}: the disk is full: a checkpoint needs {num_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. "
            f"{_remedy(folder)}"
        )


def _remedy(folder: Path) -> str:
    if not checkpoint_folders(folder):
        return "Free some space."
    return "Earlier checkpoints are untouched. Free some space; a run that has ended goes on with --resume."


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    manifest: dict[str, Any] = {"files": {}}
    for name, data in files.items():
        _write_fsynced(folder / name, data)
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256_of(folder / name)}
    _write_fsynced(folder / MANIFEST, _json(manifest))
    sync_folder(folder)


def _publish(temporary: Path, target: Path) -> None:
    if target.exists():  # the same step saved again, after a resume from an older checkpoint
        discarded = target.with_name(f".del-{target.name}-{os.getpid()}")
        target.rename(discarded)
        temporary.rename(target)
        shutil.rmtree(discarded, ignore_errors=True)
    else:
        temporary.rename(target)
    sync_folder(target.parent)


def _rotate(folder: Path, keep: int) -> None:
    for path in checkpoint_folders(folder)[:-keep]:
        discarded = path.with_name(f".del-{path.name}")
        path.rename(discarded)  # a half-deleted checkpoint must never look like one
        shutil.rmtree(discarded, ignore_errors=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_fsynced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _split_tensors(value: Any) -> tuple[dict[str, Tensor], Any]:
    """A nested state as (its tensors by name, the same structure with names in their place)."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"$tensor": name}
        if isinstance(node, Mapping):
            # JSON has only string keys; an optimiser's state is keyed by parameter number.
            return {"$items": [[key, walk(item, f"{name}.{key}")] for key, item in node.items()]}
        if isinstance(node, list | tuple):
            return [walk(item, f"{name}.{i}") for i, item in enumerate(node)]
        return node

    return tensors, walk(value, "state")


def _join_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if "$tensor" in node:
            return tensors[node["$tensor"]]
        return {key: _join_tensors(item, tensors) for key, item in node["$items"]}
    if isinstance(node, list):
        return [_join_tensors(item, tensors) for item in node]
    return node
