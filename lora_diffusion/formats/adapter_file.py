"""Adapter files: read with every check before a model is touched, written so that they read back the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.fitting import layer_size
from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, DOWN, LOHA, LOKR, UP, Geometry, geometry_of
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.container import ContainerError, Header, check_opens, read_header
from lora_diffusion.errors import RunError
from lora_diffusion.files import replacement_of
from lora_diffusion.formats.families import made_for
from lora_diffusion.formats.file_content import FileContent
from lora_diffusion.formats.layout import AdapterFileError, Format, Layout, layout_of, magnitude_shape
from lora_diffusion.formats.metadata import hash_of_pieces, legacy_hash, network_metadata
from lora_diffusion.formats.names import canonical_name, name_in_file, usual_name
from lora_diffusion.formats.peft_file import MAGNITUDES, peft_alphas, peft_metadata, peft_tensors

Modules = Mapping[str, Mapping[str, Tensor]]

_EXACT = (ALPHA, DORA_SCALE, MAGNITUDES)
"""How the keys end of what is always written as float32: rounding it would change the whole of a layer, not just the
change."""

_DTYPES = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}
"""Of what is read; other tensors in a file may have dtypes that torch does not know."""


class FilePart(Protocol):
    """A component of a base model that knows what its modules are called in files."""

    @property
    def module(self) -> nn.Module: ...

    def file_name(self, path: str) -> str: ...


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The content of an adapter file.

    modules: canonical module name (see `formats.names`) → part → tensor. What parts a module has depends on its kind:
    "lora_down.weight" (r, in[, k, k]) and "lora_up.weight" (out, r[, 1, 1]), or those of LoHa or LoKr; perhaps
    "dora_scale"; always "alpha", 0-d float32. family: "sd1", "sd2", "sdxl", or "" if nothing tells. format: the naming
    it was read with. unread: keys that belong to no module, escaped. notes: what a user should know about a usable but
    odd file. path: where it was read from.
    """

    modules: Modules
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "kohya"
    family: str = ""
    path: Path | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def geometries(self) -> dict[str, Geometry]:
        """Kind, rank and layer size of each module."""
        return {
            name: geometry_of({part: tuple(tensor.shape) for part, tensor in parts.items()})
            for name, parts in self.modules.items()
        }

    @property
    def kinds(self) -> Counter[str]:
        """How many modules of each kind: "lora", "dora", "loha", "lokr", …"""
        return Counter(geometry.name for geometry in self.geometries.values())

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Reads a kohya, LyCORIS, PEFT or older diffusers file into memory, or one of the numbered files of 2022.

        Raises AdapterFileError, naming the file, the key and the reason, for anything that is not a whole, finite,
        consistent adapter. Nothing in the file is executed, and no name in it is followed.
        """
        try:
            header = read_header(path)
        except ContainerError as error:
            raise AdapterFileError(str(error)) from error
        layout = layout_of(path, header)
        return cls._of(path, header, layout, _read_tensors(path, header, layout))

    @classmethod
    def _of(cls, path: Path, header: Header, layout: Layout, tensors: Mapping[str, Tensor]) -> AdapterFile:
        """What a file with this header and these tensors means. Raises AdapterFileError like `read`."""
        alphas = {name: tensors[keys[ALPHA]].item() for name, keys in layout.modules.items() if ALPHA in keys}
        ranks = {name: geometry.rank for name, geometry in layout.geometries.items() if name not in alphas}
        if layout.format == "peft":
            alphas |= peft_alphas(path, ranks, layout.modules, header.metadata)
        else:  # a module without alpha means scale 1 to every reader
            alphas |= {name: float(rank) for name, rank in ranks.items()}
        modules: dict[str, dict[str, Tensor]] = {}
        for name, keys in layout.modules.items():
            parts = {part: tensors[key] for part, key in keys.items() if part != ALPHA}
            if layout.format == "peft" and DORA_SCALE in parts:
                parts[DORA_SCALE] = parts[DORA_SCALE].reshape(magnitude_shape(tuple(parts[DORA_SCALE].shape)))
            alpha = torch.tensor(alphas[name], dtype=torch.float32)
            if not layout.geometries[name].rank and not alpha.isfinite():
                alpha = torch.tensor(1.0)  # of a LoKr without factors, where readers ignore it
            modules[name] = parts | {ALPHA: alpha}
        _check_values(path, layout, modules)
        file = cls(modules, header.metadata, layout.format, layout.family, path, layout.unread)
        return cls(**{**vars(file), "notes": _notes(file)})

    @classmethod
    def collect(
        cls,
        parts: Mapping[str, FilePart],
        adapters: Mapping[str, Mapping[str, Adapter]],
        metadata: Mapping[str, str] | None = None,
        *,
        family: str = "",
    ) -> AdapterFile:
        """The file of live adapters, given by part name and dotted path. Tensors are copied to the CPU.

        family: that of the model; SDXL files spell their UNet's modules in another way.
        """
        modules = {
            canonical_name(parts[part].file_name(path)): {
                key: tensor.detach().cpu().clone() for key, tensor in adapter.tensors().items()
            }
            for part, by_path in adapters.items()
            for path, adapter in by_path.items()
        }
        return cls(_with_one_alpha_per_component(modules), metadata or {}, family=family)

    def write(self, path: Path, *, format: Format = "kohya", dtype: torch.dtype | None = torch.float16) -> None:
        """Replaces `path` atomically, after it has read back what is to be there and compared.

        dtype: of all weights; None leaves each as it is. alpha and the magnitudes of a DoRA are float32 always. format:
        "peft" is for diffusers 0.34 or newer; it says alpha in its metadata, and only has LoRA and DoRA with magnitudes
        per output. Raises AdapterFileError if it cannot hold this adapter, RunError if a value does not fit `dtype`, if
        the disk is full, or if what was written reads back differently; what was at `path` is still there then.
        """
        content = FileContent(self._tensors(format, dtype))
        for key, tensor in content.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise RunError(
                    f"{path}: {key} is not finite as {kind}, so the adapter was not saved. Lower the learning "
                    "rate if the loss was not finite either, otherwise save as float32."
                )
        metadata = self._metadata_for(format, content)
        try:
            with replacement_of(path) as temporary:
                content.write(temporary, metadata)
                self._check_written(path, temporary, content)
        except OSError as error:
            raise RunError(f"{path}: the adapter cannot be written ({error.strerror}).") from error

    def _check_written(self, path: Path, temporary: Path, content: FileContent) -> None:
        """Raises RunError if the file that is to be at `path` does not hold `content`, or means something else."""
        try:
            header = read_header(temporary)
            check_opens(temporary)
            if not content.is_in(temporary, header):
                raise RunError(f"{path}: what was written reads back differently and was not kept. Check the disk.")
            again = AdapterFile._of(path, header, layout_of(path, header), content.tensors)
        except (AdapterFileError, ContainerError) as error:
            raise RunError(f"{path}: what was written cannot be used and was not kept. {error}") from error
        if _scales(again) != _scales(self):
            raise RunError(
                f"{path}: what was written reads back with other strengths and was not kept. Report this, with the "
                "command you used."
            )

    def attach(self, parts: Mapping[str, FilePart]) -> Attachment:
        """Finds the layer each module was made for. Nothing in the model is changed.

        Raises AdapterFileError if no module fits, or if one has another shape than its layer.
        """
        places = {
            _one_name(canonical_name(part.file_name(path))): (name, path, layer)
            for name, part in parts.items()
            for path, layer in _layers(part.module).items()
        }
        matches: list[Match] = []
        unread: list[str] = []
        for name, tensors in self.modules.items():
            place = places.get(_one_name(name))
            if place is None:
                unread.append(name)
                continue
            if any(place[2] is match.layer for match in matches):
                raise AdapterFileError(f"{self.path}: {name} is in the file under two names. Keep one of them.")
            geometry = self.geometries[name]
            if (geometry.outputs, geometry.inputs) != layer_size(place[2]):
                raise AdapterFileError(self._wrong_base(places, name, place[2]))
            matches.append(Match(*place, tensors))
        if not matches:
            raise AdapterFileError(self._wrong_base(places, next(iter(self.modules))))
        return Attachment(tuple(matches), tuple(unread))

    def _tensors(self, format: Format, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What the file holds: key → tensor in `dtype`, or in its own if that is None."""
        if format == "peft":
            tensors = peft_tensors(self.path, self.modules, self.kinds)
        else:
            tensors = {
                f"{name_in_file(name, self.family)}.{part}": tensor
                for name, parts in self.modules.items()
                for part, tensor in parts.items()
            }
        return {
            key: tensor.to(torch.float32 if key.endswith(_EXACT) else dtype or tensor.dtype).contiguous()
            for key, tensor in tensors.items()
        }

    def _metadata_for(self, format: Format, content: FileContent) -> dict[str, str]:
        """The given metadata, brought in line with the tensors."""
        own = ("ss_network_", "lora_adapter_metadata", "sshs_", "modelspec.hash_sha256", "unet:", "text_encoder:")
        metadata = {key: text for key, text in self.metadata.items() if not key.startswith(own)}
        if format == "peft":
            metadata |= peft_metadata(self.modules)
        else:
            alphas = {name: parts[ALPHA].item() for name, parts in self.modules.items()}
            metadata |= network_metadata(self.geometries, alphas, self.family, self.metadata)
        hashes = {"sshs_model_hash": hash_of_pieces(content.pieces())}
        if kept := {key: text for key, text in metadata.items() if key.startswith("ss_")}:
            hashes["sshs_legacy_hash"] = legacy_hash(content.header(kept), content.pieces())
        return {"format": "pt"} | metadata | hashes

    def _wrong_base(self, places: Mapping[str, tuple[str, str, Layer]], name: str, layer: Layer | None = None) -> str:
        """Why the module `name` does not fit a base with these layers, nor `layer`, the one of that name."""
        widths = {layer_size(place[2])[1] for key, place in places.items() if key.endswith("attn2_to_k")}
        base = f"this base has a cross-attention width of {max(widths)}" if widths else "this base is another"
        if layer is not None:
            geometry = self.geometries[name]
            problem = f"{name} is made for a layer of {geometry.outputs} x {geometry.inputs}, the base's is {layer}"
        else:
            problem = f"It has none of the {len(self.modules)} modules, such as {name}"
        return f"{self.path}: made for {made_for(self.geometries)}; {base}. {problem}."


@dataclass(frozen=True, eq=False)
class Match:
    """A module of an adapter file and the layer it was made for."""

    part: str
    path: str
    layer: Layer
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attachment:
    """Where an adapter file goes in a model. unread: its modules that the model does not have."""

    matches: tuple[Match, ...]
    unread: tuple[str, ...]


def _read_tensors(path: Path, header: Header, layout: Layout) -> dict[str, Tensor]:
    """The modules' tensors, in memory: a mapped file that is replaced later would change or crash a running process."""
    try:
        stored = dict(deserialize(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be read ({error}). Get the file again.") from error
    found = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in stored.items()}
    if found != {key: (info.dtype, info.shape) for key, info in header.tensors.items()}:
        raise AdapterFileError(f"{path}: changed while it was being read. Try again.")
    keys = [key for parts in layout.modules.values() for key in parts.values()]
    return {
        key: torch.frombuffer(stored[key]["data"], dtype=_DTYPES[found[key][0]]).reshape(found[key][1]) for key in keys
    }


def _check_values(path: Path, layout: Layout, modules: Modules) -> None:
    for name, parts in modules.items():
        for part, tensor in parts.items():
            if not bool(torch.isfinite(tensor).all()):
                key = layout.modules[name].get(part, f"{name}.{part}")
                raise AdapterFileError(
                    f"{path}: {key} holds NaN or infinity. The training that made it diverged, or the file is damaged; "
                    "use an earlier checkpoint."
                )


def _notes(file: AdapterFile) -> tuple[str, ...]:
    modules, notes = file.modules, []
    if zeros := sum(parts[ALPHA].item() == 0 and not _ignores_alpha(parts) for parts in modules.values()):
        notes.append(f"alpha is 0 in {zeros} of {len(modules)} modules: they change nothing")
    if blank := sum(DORA_SCALE not in parts and _is_blank(parts) for parts in modules.values()):
        notes.append(f"the weights are all 0 in {blank} of {len(modules)} modules: they change nothing")
    if file.unread:
        notes.append(f"{len(file.unread)} tensors were not read: {', '.join(file.unread[:3])[:200]}")
    ranks = {geometry.rank for geometry in file.geometries.values()} - {0}
    claimed = file.metadata.get("ss_network_dim", "")
    if ranks and claimed.isascii() and claimed.isdecimal() and claimed.lstrip("0") not in {str(rank) for rank in ranks}:
        notes.append(f"the metadata says rank {claimed[:20]}, the tensors have {', '.join(map(str, sorted(ranks)))}")
    return tuple(notes)


def _ignores_alpha(parts: Mapping[str, Tensor]) -> bool:
    return "lokr_w1" in parts and "lokr_w2" in parts


def _is_blank(parts: Mapping[str, Tensor]) -> bool:
    """Whether a factor is all 0, so that the product is."""
    return any(not bool(tensor.any()) for part, tensor in parts.items() if part in (DOWN, UP, *LOHA, *LOKR))


def _scales(file: AdapterFile) -> dict[str, float]:
    return {
        _one_name(name): parts[ALPHA].item() / file.geometries[name].rank
        for name, parts in file.modules.items()
        if file.geometries[name].rank
    }


def _with_one_alpha_per_component(modules: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same changes with one alpha in each component.

    Of differing ones diffusers (0.42) takes the most frequent for all of a text encoder and all attention layers.
    """
    for prefix in ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"):
        members = [parts for name, parts in modules.items() if name.startswith(prefix) and UP in parts]
        alphas = Counter(parts[ALPHA].item() for parts in members)
        if len(alphas) > 1:
            common = alphas.most_common(1)[0][0]
            for parts in members:
                parts[UP] = parts[UP] * (parts[ALPHA].item() / common)
                parts[ALPHA] = torch.tensor(common, dtype=torch.float32)
    return modules


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


def _one_name(name: str) -> str:
    """The same for every spelling: some programs call the one text encoder `lora_te1`, some drop its `text_model`."""
    return usual_name(name, "sdxl")
