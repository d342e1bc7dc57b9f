"""Reads the parts of a diffusers folder: weights checked, cast and really loaded, or an error that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_diffusion.container import weight_files, weight_stem
from lora_diffusion.ldm_names import Place
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from lora_diffusion.models.tokenizers import read_tokenizer
from lora_diffusion.models.weights import Stored, TensorFile, fill, misfits
from lora_diffusion.progress import Track, silent

PARTS = {"sd1": ("unet", "vae", "text_encoder"), "sd2": ("unet", "vae", "text_encoder")}
PARTS |= {"sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}
"""Family → its modules, which are also the names of their folders."""

Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Dtypes:
    """Number formats in memory: of the UNet and the text encoders, and of the VAE."""

    model: torch.dtype
    vae: torch.dtype

    def of(self, part: str) -> torch.dtype:
        return self.vae if part == "vae" else self.model


@dataclass(frozen=True)
class Components:
    """A model's modules ("unet", "text_encoder_2", …) and tokenizers ("tokenizer", …), on the CPU.

    The UNet's weights are on `meta` until `fill_unet` is called: it is the largest part, and the last that is needed.
    Their names and shapes have been checked. It raises ModelError for values that are not finite.
    """

    modules: dict[str, nn.Module]
    tokenizers: dict[str, CLIPTokenizer]
    fill_unet: Callable[[], None]


def read_folder(folder: Path, family: str, dtypes: Dtypes, track: Track = silent) -> Components:
    """The parts in a diffusers folder; raises ModelError naming the file that is missing, damaged or does not fit."""
    unet, fill_unet = _prepared(folder, "unet", dtypes.model, track)
    modules = {part: read_part(folder, part, dtypes.of(part), track) for part in PARTS[family] if part != "unet"}
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in modules if part.startswith("text_encoder")]
    return Components(
        {"unet": unet, **modules}, {name: read_tokenizer(folder / name) for name in tokenizers}, fill_unet
    )


def read_part(folder: Path, part: str, dtype: torch.dtype, track: Track = silent) -> nn.Module:
    """One part of a diffusers folder, on the CPU. Raises ModelError as `read_folder` does."""
    module, fill_module = _prepared(folder, part, dtype, track)
    fill_module()
    return module


def _prepared(folder: Path, part: str, dtype: torch.dtype, track: Track) -> tuple[nn.Module, Callable[[], None]]:
    """A part without memory whose files were found to fit, and what gives it its weights."""
    module = nn.Module.to(empty_module(part, read_json(folder / part / "config.json")), dtype)
    stored = _stored(module, folder / part, _rename(part, module))
    return module, partial(fill, module, stored, dtype, track)


class _NoValues(TorchFunctionMode):
    """Weights without memory are not filled: torch imports its compiler to pretend that it draws them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func`, unless it fills a tensor on `meta` with normal noise."""
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.trunc_normal_, Tensor.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def empty_module(part: str, config: Mapping[str, Any]) -> nn.Module:
    """The module that `config` describes, its weights still to come. Raises ModelError if we can make none of it."""
    for name in ("latents_mean", "latents_std"):
        if part == "vae" and config.get(name) is not None:
            raise ModelError(
                f"vae/config.json has {name}: the base was trained on latents that are shifted and scaled per channel, "
                "which this version does not do. Give another base; if the file is wrong, correct it there."
            )
    try:
        with init_empty_weights(), _NoValues():
            if part == "unet":
                return cast(UNet2DConditionModel, UNet2DConditionModel.from_config(dict(config)))
            if part == "vae":
                return cast(AutoencoderKL, AutoencoderKL.from_config(dict(config)))
            clip_config = CLIPTextConfig.from_dict(dict(config))
            return CLIPTextModelWithProjection(clip_config) if part == "text_encoder_2" else CLIPTextModel(clip_config)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(f"{part}/config.json: no {part} can be made of it ({error}). Get the file again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: {path.parent.parent} is not a complete diffusers folder. "
            "It needs model_index.json and the folders unet, vae, text_encoder, tokenizer and scheduler, "
            "and for SDXL text_encoder_2 and tokenizer_2."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Get the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: should hold a JSON object, holds {type(value).__name__}.")
    return value


def _stored(module: nn.Module, folder: Path, rename: Rename) -> dict[str, Stored]:
    """Where the weights of `module` are in the files of `folder`; ModelError if they are not those of its config."""
    files = [TensorFile(path) for path in weight_files(folder, weight_stem(folder.name))]
    stored = {
        renamed: Stored(file, Place(name))
        for file in files
        for name in file.header.tensors
        if (renamed := rename(name)) is not None
    }
    expected = module.state_dict()
    if problems := misfits(expected, stored):
        raise ModelError(
            f"{files[0].path}: does not fit the config.json beside it, {len(problems)} of {len(expected)} tensors: "
            f"{'; '.join(problems[:5])}. The folder mixes files of different models."
        )
    return stored


def _rename(part: str, module: nn.Module) -> Rename:
    """From names in files to names in `module`; None for what the module does not use."""
    if part == "unet":
        return str
    return _current_vae_name if part == "vae" else _clip_rename(module)


def _current_vae_name(name: str) -> str:
    """VAE files from before diffusers 0.13, the published SD 1.5 among them, name attention layers differently."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: old[match[1]], name)


def _clip_rename(text_encoder: nn.Module) -> Rename:
    """Files have a `text_model.` level or not, and so have modules (transformers 4 yes, 5 no), independently."""
    expected = text_encoder.state_dict()
    level = "text_model." if any(name.startswith("text_model.") for name in expected) else ""

    def rename(name: str) -> str | None:
        if name in expected:
            return name
        if name.endswith("position_ids") or name in ("text_projection.weight", "logit_scale"):
            return None  # a constant, and the parts of CLIP that only SDXL's second encoder uses, or nobody
        return level + name.removeprefix("text_model.")

    return rename
