"""Tiny random models on disk, for tests: every part of SD 1.x, SD 2.x and SDXL at toy width.

The folders are what the stock pipelines' `save_pretrained` would write, safetensors only, with the `text_model.` level
in the text encoders' files. Weights are drawn from one seeded generator: a seed means the same model everywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
    prediction: str | None = "epsilon",
    layers_per_block: int = 1,
    zero_terminal_snr: bool | None = None,
    widths: tuple[int, ...] = (8, 16, 16, 16),
) -> Path:
    """Writes a diffusers folder of a random SD 1.x model (about 0.5 MB) under `folder` and returns it.

    latent_factor: pixels per latent, 4 or 8. prediction, zero_terminal_snr: what the scheduler's config says; None
    leaves the entry out. layers_per_block=2 gives the module names of the real SD 1.5 UNet. widths: of the UNet's
    levels. The default picture is 64 px.
    """
    vocab_size = _write_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=64 // latent_factor,
                block_out_channels=widths,
                layers_per_block=layers_per_block,
                norm_num_groups=4,
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
            ),
            "vae": _vae(latent_factor),
            "text_encoder": CLIPTextModel(_clip_config(vocab_size)),
        }
    _write_parts(folder, parts, torch.Generator().manual_seed(seed))
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction, zero_terminal_snr))
    _write_json(folder / "model_index.json", _model_index("StableDiffusionPipeline", parts))
    return folder


def make_tiny_sd2(
    folder: Path, *, seed: int = 0, prediction: str | None = "epsilon", zero_terminal_snr: bool | None = None
) -> Path:
    """The same for SD 2.x: linear projections, heads of one width, OpenCLIP's activation and padding."""
    vocab_size = _write_tokenizer(folder / "tokenizer", pad_token="!")
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(8, 16, 16, 16),
                layers_per_block=2,
                norm_num_groups=4,
                cross_attention_dim=WIDTH,
                attention_head_dim=(1, 2, 2, 2),  # type: ignore[arg-type]
                use_linear_projection=True,
            ),
            "vae": _vae(latent_factor=4),
            "text_encoder": CLIPTextModel(_clip_config(vocab_size, hidden_act="gelu", num_hidden_layers=3)),
        }
    _write_parts(folder, parts, torch.Generator().manual_seed(seed))
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction, zero_terminal_snr))
    _write_json(folder / "model_index.json", _model_index("StableDiffusionPipeline", parts))
    return folder


def make_tiny_sdxl(
    folder: Path, *, seed: int = 0, prediction: str | None = "epsilon", zero_terminal_snr: bool | None = None
) -> Path:
    """The same for SDXL: three levels, two text encoders of different width, pooled text and sizes."""
    vocab_size = _write_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
    _write_tokenizer(folder / "tokenizer_2", pad_token="!")
    width_2, size_width = 24, 8
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16, 16),
                layers_per_block=2,
                norm_num_groups=4,
                cross_attention_dim=WIDTH + width_2,
                attention_head_dim=(1, 2, 2),  # type: ignore[arg-type]
                transformer_layers_per_block=(1, 2, 3),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=size_width,
                projection_class_embeddings_input_dim=width_2 + 6 * size_width,
            ),
            "vae": _vae(latent_factor=4, scaling_factor=0.13025),
            "text_encoder": CLIPTextModel(_clip_config(vocab_size, num_hidden_layers=3)),
            "text_encoder_2": CLIPTextModelWithProjection(
                _clip_config(
                    vocab_size, hidden_size=width_2, hidden_act="gelu", num_hidden_layers=3, projection_dim=width_2
                )
            ),
        }
    _write_parts(folder, parts, torch.Generator().manual_seed(seed))
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction, zero_terminal_snr))
    index = _model_index("StableDiffusionXLPipeline", parts) | {"force_zeros_for_empty_prompt": True}
    index |= {"image_encoder": [None, None], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
    _write_json(folder / "model_index.json", index)
    return folder


def _write_parts(folder: Path, parts: Mapping[str, Any], generator: torch.Generator) -> None:
    for name, module in parts.items():
        weights = _weights(module, generator)
        if name.startswith("text_encoder"):
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(folder / name)
            save_file(_with_text_model(weights), folder / name / "model.safetensors")
        else:
            module.save_config(folder / name)
            save_file(weights, folder / name / "diffusion_pytorch_model.safetensors")


def _vae(latent_factor: int, scaling_factor: float = 0.18215) -> AutoencoderKL:
    levels = int(math.log2(latent_factor)) + 1
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _clip_config(vocab_size: int, **changes: Any) -> CLIPTextConfig:
    width = changes.get("hidden_size", WIDTH)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    return CLIPTextConfig(**(values | changes))


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
    levels = ("text_model.", "text_projection.")
    return {name if name.startswith(levels) else f"text_model.{name}": w for name, w in weights.items()}


def _write_tokenizer(folder: Path, pad_token: str) -> int:
    """A CLIP byte-level BPE with a handful of merges: any text tokenises. Returns the vocabulary's size."""
    symbols = _byte_symbols()
    entries = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in MERGES]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {entry: i for i, entry in enumerate(entries)})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    specials |= {"unk_token": "<|endoftext|>", "pad_token": pad_token}
    _write_json(folder / "special_tokens_map.json", specials)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **specials}
    _write_json(folder / "tokenizer_config.json", settings)
    return len(entries)


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in GPT-2's byte-level BPE, which CLIP uses too."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _scheduler(prediction: str | None, zero_terminal_snr: bool | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    if prediction is not None:
        config["prediction_type"] = "v_prediction" if prediction == "v" else prediction
    if zero_terminal_snr is not None:
        config["rescale_betas_zero_snr"] = zero_terminal_snr
    return config


def _model_index(pipeline: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if pipeline == "StableDiffusionPipeline":
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    for name, module in parts.items():
        index[name] = ["transformers" if name.startswith("text_encoder") else "diffusers", type(module).__name__]
    return index


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
