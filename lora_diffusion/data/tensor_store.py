"""Named tensors in files that are known to be whole: each holds a checksum, and what was found whole is remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from lora_diffusion.data.file_facts import FileFacts, Stamp, stamp_of
from lora_diffusion.files import write_bytes_atomically

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1
_CHECKSUM = "sha256"


class TensorStore:
    """Named tensors, one safetensors file per key. Without a folder, or when it cannot be written, keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._is_writable = folder is not None
        self._written: dict[str, Stamp] = {}

    def has(self, key: str) -> bool:
        """Whether there is a file for `key`, whole or damaged."""
        return self._folder is not None and self._path(self._folder, key).exists()

    @contextmanager
    def checked(self) -> Iterator[Callable[[str], bool]]:
        """Inside, the function says whether there is a whole file for a key.

        A file that was found whole before, or written here, is not opened again as long as it stays as it was; `load`
        looks at its checksum all the same.
        """
        if self._folder is None:
            yield lambda key: False
            return
        facts = FileFacts(self._folder / "whole.json", str(LAYOUT_VERSION))
        folder = os.fspath(self._folder)

        def is_whole(key: str) -> bool:
            try:
                stamp = stamp_of(f"{folder}/{key[:2]}/{key}.safetensors")
            except OSError:
                return False
            if facts.get(key, stamp):
                return True
            if self.load(key) is None:
                return False
            facts.put(key, stamp, True)
            return True

        self._written = {}
        yield is_whole
        for key, stamp in self._written.items():
            facts.put(key, stamp, True)
        self._written = {}
        if self._is_writable:
            facts.save()

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors saved under `key`; None when there are none or the file is damaged."""
        if self._folder is None:
            return None
        try:
            tensors = tensors_from_bytes(self._path(self._folder, key).read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        checksum = tensors.pop(_CHECKSUM, None)
        if checksum is None or not torch.equal(checksum, _checksum(key, tensors)):
            return None
        return tensors

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Write the tensors; False if that is not possible, which is said once."""
        if self._folder is None or not self._is_writable:
            return False
        data = bytes_from_tensors({**tensors, _CHECKSUM: _checksum(key, tensors)})
        path = self._path(self._folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, data)
            self._written[key] = stamp_of(path)
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "%s: the cache cannot be written (%s). The run goes on and keeps entries in memory; "
                "the next run computes them again. Free space or set [cache] folder.",
                self._folder,
                error.strerror or error,
            )
            return False
        return True

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.safetensors"


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 over key, names, shapes and bytes, as 32 numbers. With the key, a file under a wrong name is noticed."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
