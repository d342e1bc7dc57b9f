"""Weights from .safetensors files into modules: one tensor at a time, cast at once, checked to be finite."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from lora_diffusion.container import Header, TensorInfo, read_header
from lora_diffusion.ldm_names import Place
from lora_diffusion.models.errors import ModelError
from lora_diffusion.progress import Track, silent

_LARGE_BYTES = 10**9  # read, cast and checked in some 2 seconds

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The container's names of the number formats that weights may have."""


class TensorFile:
    """Reads tensors of an open .safetensors file, in turns into two buffers.

    The file is not mapped, so none of it stays in memory; and freed buffers would leave holes between the weights.
    """

    def __init__(self, path: Path) -> None:
        """Raises ContainerError if the file is damaged."""
        self.path = path
        self._identity = _identity(path)
        self.header: Header = read_header(path)
        self._file: BufferedReader | None = None
        self._buffers: list[Tensor] = []

    def __enter__(self) -> Self:
        """Raises ModelError if it is another file than the one whose header was read."""
        if _identity(self.path) != self._identity:
            raise ModelError(f"{self.path}: was changed or moved while it was in use. Start again.")
        self._file = self.path.open("rb")
        largest = max((info.end - info.begin for info in self.header.tensors.values()), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._buffers.clear()

    def read_in_turn(self, places: Iterable[Place]) -> Generator[Tensor]:
        """`read` for one place after the other, each until the next; that one is read by a thread meanwhile."""
        coming: Future[Tensor] | None = None
        with ThreadPoolExecutor(1) as reader:
            for place in places:
                ready, coming = coming, reader.submit(self.read, place.key, place.third)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def read(self, name: str, third: int | None = None) -> Tensor:
        """The tensor as it is stored, until the next call but one.

        third: 0, 1 or 2 reads that third of its rows only.
        """
        assert self._file is not None, "read inside `with`"
        info = self.header.tensors[name]
        if info.dtype not in DTYPES:
            raise ModelError(
                f"{self.path}: {name} is stored as {info.dtype}, which cannot be read as a weight. "
                "Get a version in fp32, fp16, bf16 or fp8."
            )
        shape = info.shape if third is None else (info.shape[0] // 3, *info.shape[1:])
        size = (info.end - info.begin) // (1 if third is None else 3)
        self._buffers.reverse()
        stored = self._buffers[0][:size]
        self._file.seek(self.header.data_start + info.begin + (third or 0) * size)
        if self._file.readinto(stored.numpy().data) != size:
            raise ModelError(f"{self.path}: ends within {name}. Something changed the file; load it again.")
        return stored.view(DTYPES[info.dtype]).reshape(shape)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written again or replaced; empty if there is none. Network drives may lack inodes."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Stored:
    """Where a module's tensor is: the file, and the place in it."""

    file: TensorFile
    place: Place

    @property
    def info(self) -> TensorInfo:
        return self.file.header.tensors[self.place.key]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it will have when it is read."""
        shape = self.info.shape
        if self.place.third is not None and shape:
            shape = (shape[0] // 3, *shape[1:]) if shape[0] % 3 == 0 else (0,)
        return shape[::-1] if self.place.is_transposed else shape

    def fits(self, expected: Tensor) -> bool:
        """Whether the shape is that of `expected`; a 1x1 convolution and a matrix count as the same."""
        return _without_1x1(self.shape) == _without_1x1(tuple(expected.shape))


def _without_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def fill(module: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype, track: Track = silent) -> None:
    """Gives `module`, made without weights, the tensors of `stored` (name in the module → where it is) in `dtype`.

    Beside the module there are never more than two tensors in memory. track: shows how far it is, if that takes a
    while. Raises ModelError for a value that is not finite.
    """
    expected = module.state_dict()
    weights: dict[str, Tensor] = {}
    files = list(dict.fromkeys(item.file for item in stored.values()))
    names = [name for name in expected if name in stored]
    names.sort(key=lambda name: (files.index(stored[name].file), stored[name].info.begin))
    is_large = sum(tensor.nbytes for tensor in expected.values()) > _LARGE_BYTES
    tracked = track(names, f"Reading {files[0].path.name}") if is_large else names
    with closing(_read([stored[name] for name in names])) as tensors:
        for name, tensor in zip(tracked, tensors, strict=True):
            weights[name] = _finished(tensor, stored[name], tuple(expected[name].shape), dtype)
    module.load_state_dict(weights, strict=True, assign=True)


def _read(items: Iterable[Stored]) -> Generator[Tensor]:
    """Each as it is stored, until the next."""
    for file, group in groupby(items, key=lambda item: item.file):
        with file:
            yield from file.read_in_turn(item.place for item in group)


def _finished(tensor: Tensor, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    place = stored.place
    tensor = (tensor.T if place.is_transposed else tensor).to(dtype, copy=True).reshape(shape).contiguous()
    if not is_finite(tensor):
        raise ModelError(
            f"{stored.file.path}: {place.key} holds NaN or infinity as {str(dtype).removeprefix('torch.')}. "
            "The base is damaged; get it again."
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a mask of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def misfits(expected: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> list[str]:
    """What keeps `stored` from filling `expected`: missing, unknown and wrongly shaped tensors, in words."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unknown" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {stored[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and not stored[name].fits(tensor)
    ]
    return problems
