"""A tiny random SD 1.x model on disk, for tests: every part of the real thing at toy width.

The folder is what `StableDiffusionPipeline.save_pretrained` would write, safetensors only, with the `text_model.` level
in the text encoder's file. Weights are drawn from one seeded generator: a seed means the same model everywhere.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 32  # of the text encoder, and so of the UNet's cross attention
MERGES = (
    ("t", "h"),
    ("th", "e</w>"),
    ("i", "n"),
    ("r", "e"),
    ("re", "d</w>"),
    ("o", "u"),
    ("s", "t"),
    ("a", "t</w>"),
    ("c", "at</w>"),
)


def make_tiny_sd1(
    folder: Path,
    *,
    seed: int = 0,
    latent_factor: int = 4,
    prediction: str = "epsilon",
    layers_per_block: int = 1,
    zero_terminal_snr: bool = False,
) -> Path:
    """Writes a diffusers folder of a random SD 1.x model (about 0.5 MB) under `folder` and returns it.

    latent_factor: pixels per latent, 4 or 8. prediction: "epsilon" or "v". layers_per_block=2 gives the module names of
    the real SD 1.5 UNet. The default picture is 64 px.
    """
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder / "tokenizer")
    with init_empty_weights():
        unet = _unet(sample_size=64 // latent_factor, layers_per_block=layers_per_block)
        vae = _vae(latent_factor)
        text_encoder = _text_encoder(vocab_size)
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(folder / "text_encoder")
    save_file(_weights(unet, generator), folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(_weights(vae, generator), folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(_with_text_model(_weights(text_encoder, generator)), folder / "text_encoder" / "model.safetensors")
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction, zero_terminal_snr))
    _write_json(folder / "model_index.json", _model_index())
    return folder


def _unet(sample_size: int, layers_per_block: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=layers_per_block,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )


def _vae(latent_factor: int) -> AutoencoderKL:
    levels = int(math.log2(latent_factor)) + 1
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def _text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def _weights(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights for every tensor of `module`: unit gain for matrices, norms near 1, biases near 0."""
    weights = {}
    for name, tensor in module.state_dict().items():
        if "position_ids" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            weights[name] = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embedding." in name:
            weights[name] = 0.5 * noise
        else:
            weights[name] = noise / math.sqrt(tensor[0].numel())
    return weights


def _with_text_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published CLIP files have a `text_model.` level that transformers 5 modules lack."""
    return {name if name.startswith("text_model.") else f"text_model.{name}": w for name, w in weights.items()}


def _write_tokenizer(folder: Path) -> int:
    """A CLIP byte-level BPE with a handful of merges: any text tokenises. Returns the vocabulary's size."""
    symbols = _byte_symbols()
    entries = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in MERGES]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {entry: i for i, entry in enumerate(entries)})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    specials |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "special_tokens_map.json", specials)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **specials}
    _write_json(folder / "tokenizer_config.json", settings)
    return len(entries)


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in GPT-2's byte-level BPE, which CLIP uses too."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _scheduler(prediction: str, zero_terminal_snr: bool) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": "leading",
    }


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
