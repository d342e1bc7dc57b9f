"""Adapter files: read with every check before a model is touched, written so that they read back the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.container import ContainerError, Header, read_header, with_metadata
from lora_diffusion.errors import RunError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.formats.layout import (
    ALPHA,
    DOWN,
    UP,
    AdapterFileError,
    Format,
    Layout,
    cross_width,
    layout_of,
    made_for,
)
from lora_diffusion.formats.metadata import tensor_hash
from lora_diffusion.formats.names import peft_name
from lora_diffusion.formats.peft_scale import METADATA_KEY, peft_alphas

Modules = Mapping[str, Mapping[str, Tensor]]


class FilePart(Protocol):
    """A component of a base model that knows what its modules are called in files."""

    @property
    def module(self) -> nn.Module: ...

    def file_name(self, path: str) -> str: ...


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The content of an adapter file.

    modules: kohya module name -> {"lora_down.weight": (r, in[, k, k]), "lora_up.weight": (out, r[, 1, 1]),
    "alpha": 0-d float32}, always all three. unread: keys that belong to no module. notes: what a user should know
    about a usable but odd file. path: where it was read from.
    """

    modules: Modules
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: Format = "kohya"
    path: Path | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Reads a kohya, PEFT or older diffusers LoRA file into memory.

        Raises AdapterFileError, naming the file, the key and the reason, for anything that is not a whole, finite,
        consistent LoRA. Nothing in the file is executed, and no name in it is followed.
        """
        try:
            header = read_header(path)
        except ContainerError as error:
            raise AdapterFileError(str(error)) from error
        layout = layout_of(path, header)
        tensors = _read_tensors(path, header)
        ranks = {name: tensors[keys[DOWN]].shape[0] for name, keys in layout.modules.items()}
        if layout.format == "peft":
            alphas = peft_alphas(path, ranks, header.metadata)
        else:  # a kohya file without alpha means scale 1 to every reader
            alphas = {
                name: tensors[keys[ALPHA]].item() if ALPHA in keys else float(ranks[name])
                for name, keys in layout.modules.items()
            }
        modules = {
            name: {DOWN: tensors[keys[DOWN]], UP: tensors[keys[UP]], ALPHA: torch.tensor(alphas[name])}
            for name, keys in layout.modules.items()
        }
        _check_values(path, layout, modules)
        notes = _notes(modules, layout.unread, header.metadata)
        return cls(modules, header.metadata, layout.format, path, layout.unread, notes)

    @classmethod
    def collect(
        cls,
        parts: Mapping[str, FilePart],
        adapters: Mapping[str, Mapping[str, Adapter]],
        metadata: Mapping[str, str] | None = None,
    ) -> AdapterFile:
        """The file of live adapters, given by part name and dotted path. Tensors are copied to the CPU."""
        modules = {
            parts[part].file_name(path): {
                key: tensor.detach().cpu().clone() for key, tensor in adapter.tensors().items()
            }
            for part, by_path in adapters.items()
            for path, adapter in by_path.items()
        }
        return cls(modules, metadata or {})

    def write(self, path: Path, *, format: Format = "kohya", dtype: torch.dtype = torch.float16) -> None:
        """Replaces `path` atomically, then reads it back and compares.

        format: "peft" is for diffusers and folds alpha / rank into `lora_B`, as such files have no alpha.
        Raises RunError if a value does not fit `dtype`, if the disk is full, or if the file reads back differently.
        """
        tensors = self._kohya_tensors(dtype) if format == "kohya" else self._peft_tensors(dtype)
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{path}: {key} is not finite as {str(dtype).removeprefix('torch.')}, so the adapter was not "
                    "saved. Lower the learning rate if the loss was not finite either, otherwise save as float32."
                )
        data = save(tensors)
        try:
            write_bytes_atomically(path, with_metadata(data, self._metadata_for(format, tensor_hash(data))))
        except OSError as error:
            raise RunError(f"{path}: the adapter cannot be written ({error.strerror}).") from error
        try:
            AdapterFile.read(path)
            written = load(path.read_bytes())
        except (AdapterFileError, OSError) as error:
            raise RunError(f"{path}: the file was written and cannot be used. {error}") from error
        if written.keys() != tensors.keys() or not all(torch.equal(written[key], tensors[key]) for key in tensors):
            raise RunError(f"{path}: the file reads back differently from what was written. Check the disk.")

    def attach(self, parts: Mapping[str, FilePart]) -> Attachment:
        """Finds the layer each module was made for. Nothing in the model is changed.

        Raises AdapterFileError if no module fits, or if one has another shape than its layer.
        """
        places = {
            part.file_name(path): (name, path, layer)
            for name, part in parts.items()
            for path, layer in _layers(part.module).items()
        }
        layers = {name: layer for name, (_, _, layer) in places.items()}
        matches: list[Match] = []
        unread: list[str] = []
        for name, tensors in self.modules.items():
            place = places.get(name) or places.get(_alias(name))
            if place is None:
                unread.append(name)
                continue
            if any(place[2] is match.layer for match in matches):
                raise AdapterFileError(f"{self.path}: {name} is in the file under two names. Keep one of them.")
            fitted = _fit(tensors, place[2])
            if fitted is None:
                raise AdapterFileError(self._wrong_base(layers, name, place[2]))
            matches.append(Match(*place, fitted))
        if not matches:
            raise AdapterFileError(self._wrong_base(layers, next(iter(self.modules))))
        return Attachment(tuple(matches), tuple(unread))

    def _kohya_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": tensor.to(torch.float32 if part == ALPHA else dtype).contiguous()
            for name, parts in self.modules.items()
            for part, tensor in parts.items()
        }

    def _peft_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {}
        for name, parts in self.modules.items():
            scale = parts[ALPHA].item() / parts[DOWN].shape[0]
            try:
                module = peft_name(name)
            except ValueError as error:
                raise AdapterFileError(f"{self.path}: no PEFT name for this module: {error}.") from None
            tensors[f"{module}.lora_A.weight"] = parts[DOWN].to(dtype).contiguous()
            tensors[f"{module}.lora_B.weight"] = (parts[UP].float() * scale).to(dtype).contiguous()
        return tensors

    def _metadata_for(self, format: Format, model_hash: str) -> dict[str, str]:
        metadata = {key: text for key, text in self.metadata.items() if key != METADATA_KEY}
        if format == "peft":  # it is no file of networks.lora, and its alpha is folded in
            metadata = {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
        return {"format": "pt"} | metadata | {"sshs_model_hash": model_hash}

    def _wrong_base(self, layers: Mapping[str, Layer], name: str, layer: Layer | None = None) -> str:
        """Why the module `name` does not fit a base with these layers, nor `layer`, the one of that name."""
        widths = {width for key, layer in layers.items() if (width := cross_width(key, layer.weight))}
        base = f"this base has a cross-attention width of {max(widths)}" if widths else "this base is another"
        if layer is not None:
            tensors = self.modules[name]
            problem = f"{name} has shapes {tuple(tensors[DOWN].shape)} and {tuple(tensors[UP].shape)}, "
            problem += f"the base's layer is {layer}"
        else:
            problem = f"it has none of the {len(self.modules)} modules, such as {name}"
        return f"{self.path}: made for {made_for(self.modules)}; {base}. {problem[0].upper()}{problem[1:]}."


@dataclass(frozen=True, eq=False)
class Match:
    """A module of an adapter file and the layer it was made for. tensors have the layer's number of dimensions."""

    part: str
    path: str
    layer: Layer
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attachment:
    """Where an adapter file goes in a model. unread: its modules that the model does not have."""

    matches: tuple[Match, ...]
    unread: tuple[str, ...]


def _read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """All tensors, in memory: a mapped file that is replaced later would change or crash a running process."""
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be read ({error}). Get the file again.") from error
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != {k: i.shape for k, i in header.tensors.items()}:
        raise AdapterFileError(f"{path}: changed while it was being read. Try again.")
    return tensors


def _check_values(path: Path, layout: Layout, modules: Modules) -> None:
    for name, parts in modules.items():
        for part, tensor in parts.items():
            if not bool(torch.isfinite(tensor).all()):
                key = layout.modules[name].get(part, f"{name}.{part}")
                raise AdapterFileError(
                    f"{path}: {key} holds NaN or infinity. The training that made it diverged, or the file is damaged; "
                    "use an earlier checkpoint."
                )


def _notes(modules: Modules, unread: tuple[str, ...], metadata: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    if zeros := sum(parts[ALPHA].item() == 0 for parts in modules.values()):
        notes.append(f"alpha is 0 in {zeros} of {len(modules)} modules: they change nothing")
    if blank := sum(not bool(parts[UP].any() and parts[DOWN].any()) for parts in modules.values()):
        notes.append(f"the weights are all 0 in {blank} of {len(modules)} modules: they change nothing")
    if unread:
        notes.append(f"{len(unread)} tensors were not read: {', '.join(unread[:3])[:200]}")
    ranks = {parts[DOWN].shape[0] for parts in modules.values()}
    claimed = metadata.get("ss_network_dim", "")
    if claimed.isascii() and claimed.isdecimal() and claimed.lstrip("0") not in {str(rank) for rank in ranks}:
        notes.append(f"the metadata says rank {claimed[:20]}, the tensors have {', '.join(map(str, sorted(ranks)))}")
    return tuple(notes)


def _layers(root: nn.Module, prefix: str = "") -> dict[str, Layer]:
    """Every Linear and Conv2d below `root` by dotted path, and for a wrapped one the layer inside."""
    layers: dict[str, Layer] = {}
    for name, module in root.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, Adapter | AdapterStack):
            layers[path] = module.base
        elif isinstance(module, nn.Linear | nn.Conv2d):
            layers[path] = module
        else:
            layers |= _layers(module, f"{path}.")
    return layers


def _fit(tensors: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor] | None:
    """The tensors in the shapes the layer needs, or None if they do not fit it.

    A matrix and a 1x1 convolution are the same thing, and files use either for both.
    """
    weight = layer.weight
    rank = tensors[DOWN].shape[0]
    shapes = {DOWN: (rank, *weight.shape[1:]), UP: (weight.shape[0], rank, *(1,) * (weight.ndim - 2))}
    for part, shape in shapes.items():
        trimmed = [tuple(s[:2]) if tuple(s[2:]) in ((), (1, 1)) else tuple(s) for s in (tensors[part].shape, shape)]
        if trimmed[0] != trimmed[1]:
            return None
    return {part: tensor.reshape(shapes[part]) if part in shapes else tensor for part, tensor in tensors.items()}


def _alias(name: str) -> str:
    """SD 1.x files by diffusers and OneTrainer call the one text encoder `lora_te1`."""
    return f"lora_te_{name.removeprefix('lora_te1_')}" if name.startswith("lora_te1_") else name
