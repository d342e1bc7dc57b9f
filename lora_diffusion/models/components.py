"""Reads the parts of a base model: weights checked, cast and really loaded, or an error that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_diffusion.container import TensorInfo, read_header
from lora_diffusion.models.base import ModelError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Components:
    """The parts of an SD 1.x model, on the CPU. unet and text_encoder in the dtype asked for, vae in float32."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]


def read_folder(folder: Path, dtype: torch.dtype) -> Components:
    """The parts in a diffusers folder; raises ModelError naming the file that is missing, damaged or does not fit."""
    with init_empty_weights():
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json")))
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(read_json(folder / "vae" / "config.json")))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(read_json(folder / "text_encoder" / "config.json")))
    _load(unet, folder / "unet", "diffusion_pytorch_model", dtype, _keep)
    _load(vae, folder / "vae", "diffusion_pytorch_model", torch.float32, _current_vae_name)
    _load(text_encoder, folder / "text_encoder", "model", dtype, _clip_rename(text_encoder))
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    return Components(unet, vae, text_encoder, _read_tokenizer(folder / "tokenizer"), scheduler_config)


def read_single_file(path: Path, dtype: torch.dtype, config_folder: Path) -> Components:
    """The parts in a single-file checkpoint. It holds only weights: configs and tokenizer come from `config_folder`."""
    # Imported here: the pipeline pulls in image processors and takes seconds, and folders need none of it.
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    read_header(path)
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=str(config_folder), local_files_only=True, safety_checker=None
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: this checkpoint cannot be converted ({error}).") from error
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        if unread := [name for name, tensor in part.state_dict().items() if tensor.is_meta or not is_finite(tensor)]:
            raise ModelError(f"{path}: {unread[0]} is missing or not finite. Get the file again.")
    return Components(
        pipeline.unet.to(dtype=dtype),
        pipeline.vae.to(dtype=torch.float32),
        pipeline.text_encoder.to(dtype=dtype),
        pipeline.tokenizer,
        read_json(config_folder / "scheduler" / "scheduler_config.json"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: {path.parent.parent} is not a complete diffusers folder. "
            "It needs model_index.json and the folders unet, vae, text_encoder, tokenizer and scheduler."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Get the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: should hold a JSON object, holds {type(value).__name__}.")
    return value


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one component: one, or the shards its index names; half precision if it is all there is.

    Raises ModelError if there are only pickles, nothing at all, or an index that names a file outside the folder.
    """
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors"):
        path = folder / name
        if path.exists():
            return _shards(path) if name.endswith(".json") else [path]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{folder}: only {pickles[0]}, a pickle, which can run code and is not opened. Download the "
            ".safetensors variant, or convert it in a sandbox with diffusers: save_pretrained(safe_serialization=True)."
        )
    raise ModelError(f"{folder / stem}.safetensors is missing. Copy or download the model again.")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map. Get the file again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: names the shard {name!r}, which is not a plain file name. The file is forged.")
        if not (index.parent / name).exists():
            raise ModelError(f"{index.parent / name} is missing: one of {len(names)} shards. Download it again.")
    return [index.parent / name for name in names]


def _load(module: nn.Module, folder: Path, stem: str, dtype: torch.dtype, rename: Rename) -> None:
    """Fills `module`, made without weights, from its files: names and shapes first, then one tensor at a time."""
    files = weight_files(folder, stem)
    found: dict[str, tuple[Path, str, TensorInfo]] = {}
    for file in files:
        for name, info in read_header(file).tensors.items():
            if (renamed := rename(name)) is not None:
                found[renamed] = (file, name, info)
    _check_shapes(files[0], {name: info.shape for name, (_, _, info) in found.items()}, module.state_dict())
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in [name for name in found if found[name][0] == file]:
                # A copy: the library's tensor is a view of the file, which may be replaced while training runs.
                tensor = tensors.get_tensor(found[name][1]).to(dtype, copy=True)
                if not is_finite(tensor):
                    raise ModelError(
                        f"{file}: {found[name][1]} holds NaN or infinity as {str(dtype).removeprefix('torch.')}. "
                        "The base is damaged; get it again."
                    )
                weights[name] = tensor
    module.load_state_dict(weights, strict=True, assign=True)


def _check_shapes(file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    if problems:
        listed = "; ".join(problems[:5])
        raise ModelError(
            f"{file}: does not fit the config.json beside it, {len(problems)} of {len(expected)} tensors: {listed}. "
            "The folder mixes files of different models."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a mask of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _keep(name: str) -> str:
    return name


def _current_vae_name(name: str) -> str:
    """VAE files from before diffusers 0.13, the published SD 1.5 among them, name attention layers differently."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: old[match[1]], name)


def _clip_rename(text_encoder: nn.Module) -> Rename:
    """Files have a `text_model.` level or not, and so have modules (transformers 4 yes, 5 no), independently."""
    level = "text_model." if any(name.startswith("text_model.") for name in text_encoder.state_dict()) else ""

    def rename(name: str) -> str | None:
        if name.endswith("position_ids") or name in ("text_projection.weight", "logit_scale"):
            return None  # a constant, and the parts of CLIP that Stable Diffusion 1.x does not use
        return level + name.removeprefix("text_model.")

    return rename


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise ModelError(f"{folder / 'vocab.json'} is missing. Copy or download the model again.")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error}). Get the folder again.") from error
