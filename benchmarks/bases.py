"""Bases with random weights: the true architectures, and a small one. Times do not depend on the weights' values."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_diffusion.models.builtin_configs import SD1, SDXL
from lora_diffusion.models.components import empty_module

TOKENIZER = Path("samples/base/tokenizer")
REDUCED = {
    "unet": SD1["unet"] | {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 256, "sample_size": 16},
    "vae": SD1["vae"] | {"block_out_channels": [32, 64, 64, 64], "sample_size": 128},
    "text_encoder": SD1["text_encoder"]
    | {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "projection_dim": 256,
    },
    "scheduler": SD1["scheduler"],
}
"""A fifth of SD 1.5's width, 1/25 of its weights: what a step costs besides arithmetic."""
BASES: dict[str, Mapping[str, dict[str, Any]]] = {"sd15": SD1, "reduced": REDUCED, "sdxl": SDXL}
SIZES = {"sd15": 256, "reduced": 128, "sdxl": 1024}
"""Pixels of the pictures that each base is measured with."""


def write_base(name: str, folder: Path) -> Path:
    """A diffusers folder under `folder`, unless it is there already; returns it.

    In float32, SDXL in float16, as they are mostly shared. Drawn on a GPU where there is one, which takes seconds in
    place of a minute for SDXL.
    """
    if (folder / "model_index.json").exists():
        return folder
    configs = BASES[name]
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    for part, config in configs.items():
        is_text_encoder = part.startswith("text_encoder")
        if part == "scheduler":
            _write_json(folder / part / "scheduler_config.json", config | {"_class_name": "DDIMScheduler"})
            continue
        config = config | (ends | {"pad_token_id": ends["eos_token_id"]} if is_text_encoder else {})
        module: Any = empty_module(part, config)
        (folder / part).mkdir(parents=True, exist_ok=True)
        if is_text_encoder:
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(folder / part)
            shutil.copytree(TOKENIZER, folder / part.replace("text_encoder", "tokenizer"), dirs_exist_ok=True)
        else:
            module.save_config(folder / part)
        file = "model.safetensors" if is_text_encoder else "diffusion_pytorch_model.safetensors"
        dtype = torch.float16 if name == "sdxl" else torch.float32
        weights = {key: weight.to(dtype) for key, weight in _weights(module, generator)}
        save_file(weights, folder / part / file, {"format": "pt"})
    _write_json(folder / "model_index.json", _index(configs))
    return folder


def _weights(module: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Unit gain for matrices, 1 for scales of norms, 0 for biases: activations stay in a usual range."""
    for name, tensor in module.state_dict().items():
        if "position_ids" in name:
            continue
        if tensor.ndim == 1:
            weight = torch.full(tensor.shape, float("norm" in name and name.endswith("weight")))
        else:
            weight = torch.randn(tensor.shape, generator=generator, device=generator.device)
            weight = (weight / math.sqrt(tensor[0].numel())).cpu()
        published = type(module).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
        yield f"text_model.{name}" if published else name, weight


def _index(configs: Mapping[str, Any]) -> dict[str, Any]:
    is_sdxl = "text_encoder_2" in configs
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline",
        "_diffusers_version": "0.32.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
    }
    if is_sdxl:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        return index | {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    return index | {"safety_checker": [None, None], "requires_safety_checker": False}


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
