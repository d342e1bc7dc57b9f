"""The real Stable Diffusion 1.5 architecture without its weights: modules on the meta device take no memory.

The numbers are those of `unet/config.json` and `text_encoder/config.json` of the published model.
"""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


def make_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNET)


def make_text_encoder() -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
