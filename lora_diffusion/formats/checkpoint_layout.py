"""What the tensors of a base model on disk are: which layer each one belongs to, in a folder or in a single file.

Tensors have one name whatever the form of the base: the pipeline's component, then the path in diffusers and
transformers ("unet.conv_in.bias", "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.container import Header, TensorInfo
from lora_diffusion.errors import UserError
from lora_diffusion.formats.names import kohya_name
from lora_diffusion.ldm_names import TEXT_ENCODER_PREFIXES, UNET_PREFIX, openclip_place, unet_from_ldm, with_text_model

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")

_OPENCLIP_WEIGHTS = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
)
_OPENCLIP_TOP = (
    *("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),
    *("final_layer_norm.weight", "final_layer_norm.bias", "text_projection.weight"),
)
_REFINER_WIDTH = 1280  # it sees one text encoder only, SDXL's base both: 2048
_SD2_UNUSED_LAYER = 23  # SD 2.x reads the last layer but one of 24, so diffusers folders have no 24th


class BaseFileError(UserError):
    """A base model on disk cannot be read: damaged, incomplete, or of a kind that is not supported."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is on disk.

    shape: the tensor's own. dtype: the container's name for it ("F16"). begin: its first byte in the file. rows: which
    rows of the entry `key` it is, where OpenCLIP stacks q, k and v; None if it is the whole entry. is_transposed:
    whether rows and columns are swapped in the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    rows: range | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class BaseLayout:
    """family: "sd1", "sd2" or "sdxl". layers: kohya module name → its weight. others: all that is left, by name."""

    family: str
    layers: Mapping[str, TensorPlace]
    others: Mapping[str, TensorPlace]


def layout_of_folder(path: Path, parts: Mapping[str, Mapping[Path, Header]]) -> BaseLayout:
    """The layout of a diffusers folder from the headers of each component's files ("unet", "text_encoder", …)."""
    tensors = {
        f"{part}.{key if part == 'unet' else with_text_model(key)}": _place(file, header, key)
        for part, headers in parts.items()
        for file, header in headers.items()
        for key in header.tensors
    }
    return _layout(_family(path, tensors), tensors)


def layout_of_checkpoint(path: Path, header: Header) -> BaseLayout:
    """The layout of a single-file checkpoint. What belongs to no UNet or text encoder keeps its own name."""
    names = _unet_names(header.tensors)
    family = _family(path, {name: _place(path, header, key) for key, name in names.items()})
    tensors: dict[str, TensorPlace] = {}
    named: set[str] = set(names)
    for (its_family, part), prefix in TEXT_ENCODER_PREFIXES.items():
        if its_family != family:
            continue
        if prefix.endswith("transformer."):
            paths = {key: key.removeprefix(prefix) for key in header.tensors if key.startswith(prefix)}
            names |= {key: f"{part}.{with_text_model(path)}" for key, path in paths.items()}
            named |= paths.keys()
        else:
            found = _openclip_tensors(path, header, prefix, is_sd2=family == "sd2")
            tensors |= {f"{part}.{name}": place for name, place in found.items()}
            named |= {place.key for place in found.values()}
    tensors |= {name: _place(path, header, key) for key, name in names.items()}
    tensors |= {key: _place(path, header, key) for key in header.tensors if key not in named}
    return _layout(family, tensors)


def _layout(family: str, tensors: Mapping[str, TensorPlace]) -> BaseLayout:
    first = "lora_te1" if family == "sdxl" else "lora_te"
    prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}
    layers: dict[str, TensorPlace] = {}
    others: dict[str, TensorPlace] = {}
    for name, place in tensors.items():
        part, _, path = name.partition(".")
        if part in prefixes and _is_layer(part, path, place):
            layers[kohya_name(prefixes[part], path.removesuffix(".weight"))] = place
        else:
            others[name] = place
    return BaseLayout(family, layers, others)


def _is_layer(part: str, path: str, place: TensorPlace) -> bool:
    """Whether it is the weight of a Linear or Conv2d that adapters may change.

    Of the text projections only that of SDXL's second encoder is one; no model here computes with another.
    """
    is_table = ".embeddings." in path or (path.startswith("text_projection.") and part != "text_encoder_2")
    return path.endswith(".weight") and len(place.shape) in (2, 4) and place.dtype in FLOATS and not is_table


def _family(path: Path, tensors: Mapping[str, TensorPlace]) -> str:
    """The family, by the UNet's names and shapes."""
    shapes = {name.removeprefix("unet."): p.shape for name, p in tensors.items() if name.startswith("unet.")}
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2}
    if "conv_in.weight" not in shapes or not widths:
        found = ", ".join(sorted(place.key for place in tensors.values())[:3]) or "none of its tensors has such a name"
        raise BaseFileError(
            f"{path}: has no UNet in the Stable Diffusion layout ({found}). Give an SD 1.x, SD 2.x or SDXL base: a "
            "diffusers folder or a .safetensors checkpoint."
        )
    if shapes["conv_in.weight"][1:2] != (4,):
        raise BaseFileError(
            f"{path}: its UNet does not have 4 input channels: an inpainting or editing model. Give a text-to-image "
            "base."
        )
    if "add_embedding.linear_1.weight" in shapes:
        if max(widths) == _REFINER_WIDTH:
            raise BaseFileError(f"{path}: is the SDXL refiner, which no adapter is made for. Give an SDXL base.")
        return "sdxl"
    has_linear_projections = any(
        name.endswith("attentions.0.proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()
    )
    return "sd2" if max(widths) == 1024 or has_linear_projections else "sd1"


def _unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Key → name of the UNet's tensors in a single file. What has no name in diffusers is left out."""
    paths = {key: key.removeprefix(UNET_PREFIX) for key in keys if key.startswith(UNET_PREFIX)}
    # A downsampler ends each group of layers_per_block + 1 input blocks; the published models all have 2 layers.
    downsamplers = [
        int(match[1]) for path in paths.values() if (match := re.match(r"input_blocks\.(\d+)\.0\.op", path))
    ]
    layers_per_block = max(1, min(downsamplers, default=3) - 1)
    names: dict[str, str] = {}
    for key, path in paths.items():
        try:
            names[key] = f"unet.{unet_from_ldm(path, layers_per_block=layers_per_block)}"
        except ValueError:
            continue
    return names


def _openclip_tensors(file: Path, header: Header, prefix: str, *, is_sd2: bool) -> dict[str, TensorPlace]:
    """Name in transformers → place, of an OpenCLIP text encoder whose keys begin with `prefix`."""
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d{1,4})\.")
    numbers = {int(match[1]) for key in header.tensors if (match := layer.match(key))}
    paths = [*_OPENCLIP_TOP]
    for number in sorted(numbers - ({_SD2_UNUSED_LAYER} if is_sd2 else set())):
        paths += [f"encoder.layers.{number}.{name}.{kind}" for name in _OPENCLIP_WEIGHTS for kind in ("weight", "bias")]
    tensors: dict[str, TensorPlace] = {}
    for path in paths:
        place = openclip_place(path)
        info = header.tensors.get(prefix + place.key)
        if info is None:
            continue
        name = with_text_model(path)
        if place.third is None:
            tensors[name] = _place(file, header, prefix + place.key, is_transposed=place.is_transposed)
        else:
            tensors[name] = _third(file, header, prefix + place.key, info, place.third)
    return tensors


def _third(file: Path, header: Header, key: str, info: TensorInfo, third: int) -> TensorPlace:
    if not info.shape or info.shape[0] % 3:
        raise BaseFileError(
            f"{file}: {key} has shape {info.shape}; it should stack q, k and v of equal height. Get the file again."
        )
    height = info.shape[0] // 3
    begin = header.data_start + info.begin + third * (info.end - info.begin) // 3
    rows = range(third * height, (third + 1) * height)
    return TensorPlace(file, key, (height, *info.shape[1:]), info.dtype, begin, rows)


def _place(file: Path, header: Header, key: str, *, is_transposed: bool = False) -> TensorPlace:
    info = header.tensors[key]
    begin = header.data_start + info.begin
    shape = info.shape[::-1] if is_transposed else info.shape
    return TensorPlace(file, key, shape, info.dtype, begin, is_transposed=is_transposed)
