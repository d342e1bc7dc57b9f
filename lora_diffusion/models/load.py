"""Finds a base model, makes sure that it is one we can train, and loads it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_diffusion.container import PICKLE_SUFFIXES, conversion_command, read_header, weight_stem
from lora_diffusion.diffusion.schedule import Prediction
from lora_diffusion.models.attention import AttentionKind, set_attention
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.components import PARTS, Dtypes, read_folder, read_json, read_part
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.families import FAMILIES, NAMES, Evidence, family_of_checkpoint, family_of_config
from lora_diffusion.models.fingerprint import fingerprint
from lora_diffusion.models.heap import keep_heap
from lora_diffusion.models.hub import hub_folder, is_hub_id
from lora_diffusion.models.libraries import UNet2DConditionModel
from lora_diffusion.models.matmul_conv import multiply_convolutions
from lora_diffusion.models.packed_conv import has_fast_bf16
from lora_diffusion.models.quantise import QuantiseKind, check_quantise, quantise_linears
from lora_diffusion.models.schedules import check_scheduler_class, evidence_of_scheduler, resolve_scheduler
from lora_diffusion.models.single_file import checkpoint_schedule, read_checkpoint
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)

HUB_FILES = ("model_index.json", "*/*.json", "tokenizer*/*")
HUB_WEIGHTS = tuple(f"{part}/{weight_stem(part)}" for part in PARTS["sdxl"])  # the other families have fewer parts
_WHOLE_ENDINGS = (".safetensors", "-*-of-*.safetensors")
_HALF_ENDINGS = (".fp16.safetensors", ".fp16-*-of-*.safetensors")


def load_model(
    path: Path | str,
    *,
    family: str = "auto",
    prediction: Literal["auto"] | Prediction = "auto",
    zero_terminal_snr: Literal["auto"] | bool = "auto",
    configs: Path | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: AttentionKind = "auto",
    quantise: QuantiseKind = "none",
    prepare: Callable[[DiffusionModel], None] | None = None,
    unet_waits: bool = False,
    track: Track = silent,
) -> DiffusionModel:
    """The base model at `path`, frozen and in evaluation mode.

    path: a diffusers folder, a single .safetensors checkpoint, or a hub id such as "owner/name". configs: a diffusers
    folder with the configs and the tokenizer of a single file; what it lacks is the family's own. vae_dtype: None is
    float16 for a half-precision base on a GPU, bfloat16 for a bfloat16 base on a CPU that computes with it, else
    float32; float16 rounds eight times finer, and what overflows in it is computed again in float32.
    quantise: how the UNet's linear layers are kept; they compute in `dtype` either way. prepare: called with the model
    while it is on the CPU and no layer is quantised yet. unet_waits: the UNet stays on disk (on the CPU with `prepare`)
    until `DiffusionModel.place_unet`, so that nothing holds it beside what encodes pictures and captions. track: shows
    how much of a large part has been read.
    Raises ModelError (or ContainerError for a damaged file) if it cannot be found, is a pickle, is of another family
    than asked for or of one this version does not train, or if its files contradict a setting.
    """
    check_quantise(quantise)
    if torch.device(device).type == "cpu":
        keep_heap()
    source = find(path)
    evidence = detect_family(source)
    _check_family(source, family, evidence)
    _check_configs(source, configs)
    found = evidence.family
    if vae_dtype is None:
        vae_dtype = _vae_dtype(dtype, torch.device(device))
    dtypes = Dtypes(dtype, vae_dtype)
    if source.is_dir():
        check_scheduler_class(read_json(source / "model_index.json").get("scheduler"), "model_index.json")
        scheduler = read_json(source / "scheduler" / "scheduler_config.json")
        known = evidence_of_scheduler(scheduler)
    else:
        scheduler, known = checkpoint_schedule(source, found, configs)
    scheduler = resolve_scheduler(scheduler, known, prediction=prediction, zero_terminal_snr=zero_terminal_snr)
    if source.is_dir():
        parts = read_folder(source, found, dtypes, track)
    else:
        parts = read_checkpoint(source, found, scheduler["prediction_type"], dtypes, configs, track)
    components: dict[str, Any] = {**parts.modules, **parts.tokenizers}
    model = FAMILIES[found](**components, scheduler_config=scheduler, dtype=dtype)
    model.fingerprint = fingerprint(source, PARTS[found])
    if source.is_dir():
        model.reloads = {part: partial(read_part, source, part, dtypes.of(part)) for part in PARTS[found][1:]}
    stays_on_disk = unet_waits and prepare is None
    if not stays_on_disk:
        parts.fill_unet()
    if prepare is not None:
        prepare(model)
    choose_kernels(model.unet, attention, torch.device(device))

    def move_unet() -> None:
        if stays_on_disk:
            parts.fill_unet()
        quantise_linears(model.unet, quantise, device)  # before the rest: `device` never sees the full weights together
        nn.Module.to(model.unet, device)

    model.let_unet_wait(move_unet)
    if not unet_waits:
        model.place_unet()
    for name, part in model.named_children():
        if name != "unet":
            part.to(device)
    return model


def choose_kernels(unet: UNet2DConditionModel, attention: AttentionKind, device: torch.device) -> None:
    """Let `unet` compute its attention by `attention`, and its convolutions, as is fastest on `device`."""
    set_attention(unet, attention, device)
    if device.type == "cpu":
        multiply_convolutions(unet)


def _vae_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return torch.float16
    # Latents of the base that ships are off by 0.7 % then, and take half the time.
    return torch.bfloat16 if device.type == "cpu" and dtype == torch.bfloat16 and has_fast_bf16() else torch.float32


def find(path: Path | str) -> Path:
    """The local folder or file that `path` means, downloading it first if it is a hub id."""
    local = Path(path).expanduser()
    if local.suffix in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path}: {local.suffix} files are pickles, which can run code, and are not opened. Get the .safetensors "
            f"version, or convert it:\n{conversion_command(local, local.with_suffix('.safetensors'))}"
        )
    if local.is_file() or (local / "model_index.json").is_file():
        return local
    if local.exists():
        raise ModelError(f"{path}: this folder has no model_index.json, so it is not a diffusers model.")
    if is_hub_id(str(path)) and not local.parent.exists():
        return _hub_model(str(path))
    raise ModelError(
        f"{path}: there is no such folder or file (looked in {Path.cwd()}). Give model.path a diffusers folder, "
        "a .safetensors checkpoint, or a hub id such as 'owner/name'."
    )


def _hub_model(repo: str) -> Path:
    """The local copy of a hub repository; of its parts in half precision, those that it has in no other."""
    patterns = (*HUB_FILES, *(f"{stem}{ending}" for stem in HUB_WEIGHTS for ending in _WHOLE_ENDINGS))
    folder = hub_folder(repo, patterns)
    halves = [
        f"{stem}{half}"
        for stem in HUB_WEIGHTS
        if (folder / stem).parent.is_dir()
        and not any(any(folder.glob(f"{stem}{ending}")) for ending in (*_WHOLE_ENDINGS, *_HALF_ENDINGS))
        for half in _HALF_ENDINGS
    ]
    return hub_folder(repo, (*patterns, *halves)) if halves else folder


def detect_family(source: Path) -> Evidence:
    """Which family a diffusers folder or a single file holds, from configs and headers alone."""
    if source.is_dir():
        pipeline_class = str(read_json(source / "model_index.json").get("_class_name", "unnamed"))
        unet = source / "unet" / "config.json"
        return family_of_config(pipeline_class, read_json(unet) if unet.parent.exists() else {})
    return family_of_checkpoint({name: info.shape for name, info in read_header(source).tensors.items()})


def _check_configs(source: Path, configs: Path | None) -> None:
    if configs is None:
        return
    if not configs.is_dir():
        raise ModelError(f"model.configs is {str(configs)!r}, which is no folder. Give a folder in diffusers layout.")
    if source.is_dir():
        logger.warning(
            "model.configs is not used: it is for single-file checkpoints, and %s is a folder with its own. Leave it "
            "out, or correct the files there.",
            source,
        )


def _check_family(source: Path, asked: str, evidence: Evidence) -> None:
    trains = ", ".join(NAMES[name] for name in FAMILIES)
    found = NAMES.get(evidence.family, "not a Stable Diffusion UNet model we know")
    if evidence.family not in FAMILIES:
        raise ModelError(f"{source}: this is {found}: {evidence.fact}. This version trains {trains}.")
    if asked not in ("auto", evidence.family):
        raise ModelError(
            f"{source}: model.family is {asked!r}, but this is {found}: {evidence.fact}. "
            "Set model.family = 'auto' or give another base."
        )
