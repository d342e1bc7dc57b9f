"""The published architectures without their weights: modules on the meta device take no memory.

The numbers are those of the configs of SD 1.5 (tests/sd15.py), stable-diffusion-2-1-base, stable-diffusion-2-1 and
stable-diffusion-xl-base-1.0, written down apart from the package's own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import sd15

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1": sd15.UNET,
    "sd2": dict(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ),
    "sdxl": dict(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
UNETS["sd2-v"] = UNETS["sd2"] | dict(sample_size=96, upcast_attention=True)
OPENCLIP_H = dict(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    max_position_embeddings=77,
    hidden_act="gelu",
    projection_dim=512,
)
OPENCLIP_BIGG = dict(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    max_position_embeddings=77,
    hidden_act="gelu",
    projection_dim=1280,
)
TEXT_ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"text_encoder": sd15.TEXT_ENCODER},
    "sd2": {"text_encoder": OPENCLIP_H},
    "sd2-v": {"text_encoder": OPENCLIP_H},
    "sdxl": {"text_encoder": sd15.TEXT_ENCODER, "text_encoder_2": OPENCLIP_BIGG},
}
VAE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
)
LATENT_SCALES = {"sd1": 0.18215, "sd2": 0.18215, "sd2-v": 0.18215, "sdxl": 0.13025}


def make_unet(version: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[version])


def make_vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**VAE)


def make_text_encoder(version: str, part: str = "text_encoder") -> nn.Module:
    config = CLIPTextConfig(**TEXT_ENCODERS[version][part])
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config) if part == "text_encoder_2" else CLIPTextModel(config)
