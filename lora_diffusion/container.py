"""The safetensors container, read without torch: an 8-byte header length, a JSON header, then the tensors' bytes.

The header alone says what a file holds, so a wrong or damaged file is refused before any weight is read.
Layout: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_diffusion.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}

_WEIGHT_ENDINGS = (
    *(".safetensors", ".safetensors.index.json"),
    *(".fp16.safetensors", ".safetensors.index.fp16.json", ".safetensors.fp16.index.json"),
)
"""What follows the stem in names of weight files and of indexes of shards; diffusers no longer writes the last."""

_SCALED_FP8 = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")
"""How the names of tensors end that ComfyUI's older and newer files of scaled weights have beside the weights."""


class ContainerError(UserError):
    """A file is not a whole, readable safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """One header entry. dtype: the container's name for it ("F16"). begin, end: bytes from the data's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself. `data_start` is the offset of the first tensor byte."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The checked header of `path`.

    Raises ContainerError if the file is missing, is not a regular file, is a pickle or another format, is cut short or
    too long, or if its tensors overlap or leave gaps. Nothing in the file is executed.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ContainerError(f"{path}: this is not a file. Give the path of a .safetensors file.")
            length = _header_length(path, file.read(8), status.st_size)
            raw = file.read(length)
    except FileNotFoundError:
        raise ContainerError(f"{path}: there is no such file. Check the path.") from None
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read ({error.strerror}).") from None
    return _parse(path, raw, data_size=status.st_size - 8 - length)


def weight_stem(part: str) -> str:
    """How the names of the weight files of "unet", "vae" or "text_encoder" begin in a diffusers folder."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one component of a diffusers folder, in the order in which diffusers looks for them.

    They are one whole file, or the shards that its index names, or those in half precision if that is all there is.
    Raises ContainerError if there are only pickles, nothing at all, or an index that names a file outside the folder.
    """
    for ending in _WEIGHT_ENDINGS:
        path = folder / f"{stem}{ending}"
        if path.exists():
            return _shards(path) if ending.endswith(".json") else [path]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ContainerError(
            f"{folder}: only {pickles[0]}, a pickle, which can run code and is not opened. Download the .safetensors "
            "variant, or convert it in a sandbox with diffusers: save_pretrained(safe_serialization=True)."
        )
    raise ContainerError(
        f"{folder / stem}.safetensors is missing, and so is {stem}.fp16.safetensors: {folder.parent} is not a complete "
        "diffusers folder. Copy or download the model again, or choose one with .safetensors weights."
    )


def scaling_problem(header: Header) -> str:
    """Why the values in a base's file are not its weights, and what to do; "" if they are."""
    for name in header.tensors:
        if name.endswith(_SCALED_FP8):
            return f"its weights are scaled fp8 ({name} says so), which is not read. Get a version in fp16 or bf16."
    return ""


def conversion_command(pickle: Path, target: Path) -> str:
    """A command that turns a pickled checkpoint into a .safetensors file; torch runs no code of the file in it."""
    script = (
        "import sys, torch; from safetensors.torch import save_file; "
        "c = torch.load(sys.argv[1], map_location='cpu', weights_only=True); c = c.get('state_dict', c); "
        "save_file({k: v.clone().contiguous() for k, v in c.items() if torch.is_tensor(v)}, sys.argv[2], "
        "{'format': 'pt'})"
    )
    return f'python -c "{script}" {shlex.quote(str(pickle))} {shlex.quote(str(target))}'


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A serialised file with `metadata` in its header, in the order of the keys.

    The safetensors library writes metadata in a random order, so the same content would not be the same file.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    return header_of_entries(entries, metadata) + data[start:]


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What a file of these tensors begins with, up to the first tensor's bytes; metadata in the order of the keys."""
    entries = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.begin, info.end)}
        for name, info in tensors.items()
    }
    return header_of_entries(entries, metadata)


def header_of_entries(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """As `header_bytes`, of a table of tensors as the file has it: name → dtype, shape and data_offsets."""
    texts = {valid_text(key): valid_text(text) for key, text in sorted(metadata.items())}
    header = json.dumps({"__metadata__": texts, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header


def valid_text(text: str) -> str:
    """The text, with a backslash and a number for what is no Unicode: bytes of a file name that are not UTF-8.

    Python's JSON lets them through; the safetensors library opens no file that has them in its header.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_opens(path: Path) -> None:
    """Raises ContainerError if the safetensors library, with which other programs read, cannot open the file.

    Tells nothing of a path that is not UTF-8, which the library opens never, whatever the file holds.
    """
    if valid_text(str(path)) != str(path):
        return
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ContainerError(f"{path}: the safetensors library cannot open it ({error}).") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens like `os.open`, but a named pipe fails the check above instead of blocking for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length <= min(MAX_HEADER_BYTES, size - 8):
        return length
    if start.startswith(PICKLE_STARTS):  # a sound length may begin with these bytes too, so only here
        raise ContainerError(
            f"{path}: this is a pickled PyTorch file, whatever its name says. Pickles can run code and are not "
            "opened. Get the .safetensors version, or convert the file in a sandbox you trust."
        )
    raise ContainerError(
        f"{path}: not a safetensors file, or cut short ({size} bytes in all, the header alone should have "
        f"{length}). Download or copy it again."
    )


def _parse(path: Path, raw: bytes, data_size: int) -> Header:
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = _metadata(entries.pop("__metadata__", {}))
        tensors = {name: _tensor_info(name, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ContainerError(
            f"{path}: the safetensors header is damaged: {reason[:200]}. Get the file again."
        ) from None
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            raise ContainerError(
                f"{path}: tensor {name[:100]!r} starts at byte {info.begin}, expected {end}: tensors overlap or leave "
                "a gap. The file is damaged or forged; get it again."
            )
        end = info.end
    if end != data_size:
        raise ContainerError(
            f"{path}: the tensors need {end} bytes, the file has {data_size} after its header. "
            f"It was {'cut short' if end > data_size else 'extended'}; download or copy it again."
        )
    return Header(tensors, metadata, data_start=8 + len(raw))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _metadata(entries: object) -> dict[str, str]:
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return entries


def _tensor_info(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    counts = [*shape, begin, end]
    if dtype not in BITS or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"tensor {name[:100]!r} has an impossible dtype, shape or place")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"tensor {name[:100]!r} of shape {shape} does not fill its {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ContainerError(f"{index}: cannot be read as an index of shards ({error}). Get the file again.") from error
    if not names:
        raise ContainerError(f"{index}: its weight_map is empty. Get the file again.")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ContainerError(f"{index}: names the shard {name!r}, which is not a plain file name. It is forged.")
        if not (index.parent / name).exists():
            raise ContainerError(f"{index.parent / name} is missing: one of {len(names)} shards. Download it again.")
    return [index.parent / name for name in names]
