"""Finds a base model, makes sure that it is one we can train, and loads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download

from lora_diffusion.container import read_header
from lora_diffusion.diffusion.schedule import Prediction
from lora_diffusion.models.attention import AttentionKind, set_attention
from lora_diffusion.models.base import DiffusionModel, ModelError
from lora_diffusion.models.components import PICKLE_SUFFIXES, read_folder, read_json, read_single_file
from lora_diffusion.models.families import FAMILIES, NAMES, Evidence, family_of_checkpoint, family_of_config
from lora_diffusion.models.quantise import QuantiseKind, check_quantise, quantise_linears

HUB_FILES = ("model_index.json", "*/*.json", "tokenizer/*")
HUB_WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
SINGLE_FILE_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Hub id of the configs and the tokenizer that single-file SD 1.x checkpoints rely on but do not hold."""


def load_model(
    path: Path | str,
    *,
    family: str = "auto",
    prediction: Literal["auto"] | Prediction = "auto",
    zero_terminal_snr: Literal["auto"] | bool = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: AttentionKind = "auto",
    quantise: QuantiseKind = "none",
) -> DiffusionModel:
    """The base model at `path`, frozen and in evaluation mode.

    path: a diffusers folder, a single .safetensors checkpoint, or a hub id such as "owner/name".
    quantise: how the UNet's linear layers are kept; they compute in `dtype` either way.
    Raises ModelError (or ContainerError for a damaged file) if it cannot be found, is a pickle, is of another family
    than asked for, or of one this version does not train.
    """
    check_quantise(quantise)
    source = find(path)
    evidence = detect_family(source)
    _check_family(source, family, evidence)
    if source.is_dir():
        parts = read_folder(source, dtype)
    else:
        parts = read_single_file(source, dtype, _hub_folder(SINGLE_FILE_CONFIG, HUB_FILES))
    model = FAMILIES[evidence.family](
        **vars(parts), dtype=dtype, prediction=prediction, zero_terminal_snr=zero_terminal_snr
    )
    quantise_linears(model.unet, quantise, device)  # before the rest: `device` never sees the full weights together
    set_attention(model.unet, attention, torch.device(device))
    return model.to(device)


def find(path: Path | str) -> Path:
    """The local folder or file that `path` means, downloading it first if it is a hub id."""
    local = Path(path).expanduser()
    if local.suffix in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path}: {local.suffix} files are pickles, which can run code, and are not opened. Get the .safetensors "
            "version, or convert the file in a sandbox you trust."
        )
    if local.is_file() or (local / "model_index.json").is_file():
        return local
    if local.exists():
        raise ModelError(f"{path}: this folder has no model_index.json, so it is not a diffusers model.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and not local.parent.exists():
        weights = tuple(f"{stem}{ending}" for stem in HUB_WEIGHTS for ending in (".safetensors", "-*-of-*.safetensors"))
        return _hub_folder(str(path), HUB_FILES + weights)
    raise ModelError(
        f"{path}: there is no such folder or file (looked in {Path.cwd()}). Give model.path a diffusers folder, "
        "a .safetensors checkpoint, or a hub id such as 'owner/name'."
    )


def detect_family(source: Path) -> Evidence:
    """Which family a diffusers folder or a single file holds, from configs and headers alone."""
    if source.is_dir():
        pipeline_class = str(read_json(source / "model_index.json").get("_class_name", "unnamed"))
        unet = source / "unet" / "config.json"
        return family_of_config(pipeline_class, read_json(unet) if unet.parent.exists() else {})
    return family_of_checkpoint({name: info.shape for name, info in read_header(source).tensors.items()})


def _check_family(source: Path, asked: str, evidence: Evidence) -> None:
    trains = " and ".join(NAMES[name] for name in FAMILIES)
    found = NAMES.get(evidence.family, "not a Stable Diffusion UNet model we know")
    if evidence.family not in FAMILIES:
        raise ModelError(f"{source}: this is {found}: {evidence.fact}. This version trains {trains}.")
    if asked not in ("auto", evidence.family):
        raise ModelError(
            f"{source}: model.family is {asked!r}, but this is {found}: {evidence.fact}. "
            "Set model.family = 'auto' or give another base."
        )


def _hub_folder(repo: str, patterns: tuple[str, ...]) -> Path:
    """The local copy of a hub repository's files, downloaded as needed; offline, only what is cached."""
    try:
        # A short timeout, so that an offline machine is told so at once.
        return Path(snapshot_download(repo, allow_patterns=list(patterns), etag_timeout=3))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{repo}: not a local path, and it cannot be had from the Hugging Face hub ({reason}). Check the spelling "
            "and the connection, or download it elsewhere and give the folder's path."
        ) from error
