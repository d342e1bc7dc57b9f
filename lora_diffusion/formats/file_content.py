"""The content of a safetensors file in memory, laid out as the safetensors library does, and written without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.container import Header, TensorInfo, header_bytes

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""dtype → the container's name for it, in the order in which the library puts tensors into a file."""


@dataclass(frozen=True)
class FileContent:
    """tensors: key → contiguous tensor on the CPU, of one of the four dtypes above."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The table of tensors, in the order of the file."""
        order = list(_DTYPES)
        infos: dict[str, TensorInfo] = {}
        end = 0
        for key in sorted(self.tensors, key=lambda key: (order.index(self.tensors[key].dtype), key)):
            tensor, begin = self.tensors[key], end
            end = begin + tensor.numel() * tensor.itemsize
            infos[key] = TensorInfo(_DTYPES[tensor.dtype], tuple(tensor.shape), begin, end)
        return infos

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The beginning of the file with this metadata."""
        return header_bytes(self.infos, metadata)

    def pieces(self) -> Iterator[memoryview]:
        """The bytes after the header, tensor by tensor; views, not copies."""
        for key in self.infos:
            yield self.tensors[key].detach().reshape(-1).view(torch.uint8).numpy().data

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        with path.open("wb") as file:
            file.write(self.header(metadata))
            for piece in self.pieces():
                file.write(piece)

    def is_in(self, path: Path, header: Header) -> bool:
        """Whether the file, whose header this is, holds these very tensors."""
        if header.tensors != self.infos:
            return False
        with path.open("rb") as file:
            file.seek(header.data_start)
            return all(file.read(len(piece)) == piece for piece in self.pieces())
