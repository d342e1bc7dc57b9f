"""The configs of the published models: a single-file checkpoint holds weights only.

The numbers are those of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1-base, stable-diffusion-2-1 and
stable-diffusion-xl-base-1.0. What is left out is the default of diffusers or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Configs = dict[str, dict[str, Any]]
"""Part ("unet", "vae", "text_encoder", …, "scheduler") → its config."""

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""What all Stable Diffusion models share; also what a folder's scheduler_config.json leaves out."""
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}

SD1: Configs = {
    "unet": _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768},
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "scheduler": SCHEDULER,
}
SD2: Configs = {
    "unet": _UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "vae": _VAE,
    "text_encoder": _CLIP
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # of OpenCLIP ViT-H's 24: the model was trained on the last but one
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "pad_token_id": 0,
    },
    "scheduler": SCHEDULER,
}
SD2_V: Configs = SD2 | {"unet": SD2["unet"] | {"sample_size": 96, "upcast_attention": True}}
SDXL: Configs = {
    "unet": _UNET
    | {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        "pad_token_id": 0,
    },
    "scheduler": SCHEDULER | {"timestep_spacing": "leading"},
}

PADDING = {("sd1", "text_encoder"): "<|endoftext|>", ("sd2", "text_encoder"): "!"}
PADDING |= {("sdxl", "text_encoder"): "<|endoftext|>", ("sdxl", "text_encoder_2"): "!"}
"""(family, text encoder) → the token that fills captions up, which the vocabulary does not tell."""


def builtin_configs(family: str, prediction_type: str) -> Mapping[str, dict[str, Any]]:
    """The configs of `family`. prediction_type: "v_prediction" is the 768 px version of SD 2.x."""
    if family == "sd2" and prediction_type == "v_prediction":
        return SD2_V
    return {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}[family]
