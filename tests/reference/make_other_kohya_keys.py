"""Writes sdxl_kohya_keys.txt and sd21_kohya_keys.txt: the module names of kohya LoRAs with `conv_dim` for these models.

The rule goes by class, as in make_sd15_kohya_keys. sd-scripts trains SDXL in a UNet of its own whose modules are called
as in the first release of Stable Diffusion (LDM); its names are those of the blocks in the order in which the data goes
through them. That order is all that is used here: three flat lists of blocks are counted off, one per way through the
UNet, so nothing is shared with the table under test.

What the counts must be, from the published configs:
SDXL UNet: a transformer block has 2 · 4 projections and 2 feed-forward layers, an attention 2 more around its blocks.
  Depths are 2, 2 on the way down at level 1, 10, 10 at level 2, 10 in the middle, and 10 · 3 and 2 · 3 on the way up:
  70 blocks and 11 attentions, 70 · 10 + 11 · 2 = 722. With convolutions: 17 residual blocks of 3 layers, a shortcut in
  11 of them (2 down, all 9 up), 2 downsamplers, 2 upsamplers: 51 + 11 + 4 = 66.
SDXL text encoders: 12 · 6 = 72 and 32 · 6 = 192.
SD 2.1: its UNet is that of SD 1.5 in wider clothes, 16 · 10 + 16 · 2 = 192 and 22 · 3 + 14 + 6 = 86; 23 · 6 = 138.

Run from the repository's root: python -m tests.reference.make_other_kohya_keys
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.reference.make_sd15_kohya_keys import CLIP_CLASSES, UNET_CLASSES, names

SDXL_LIST = Path(__file__).with_name("sdxl_kohya_keys.txt")
SD21_LIST = Path(__file__).with_name("sd21_kohya_keys.txt")

# The numbers of unet/config.json and text_encoder*/config.json of the published models.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD21_UNET: dict[str, Any] = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def make_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def make_text_encoder(config: dict[str, int], *, projects: bool = False) -> nn.Module:
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))


def text_encoder_names(encoder: nn.Module, prefix: str) -> set[str]:
    level = "" if hasattr(encoder, "text_model") else ".text_model"
    return names(encoder, CLIP_CLASSES, f"{prefix}{level}")


def ldm_blocks(unet: UNet2DConditionModel) -> dict[str, str]:
    """Where each block is in a UNet of LDM: "down_blocks.1.attentions.0" → "input_blocks.4.1".

    On the way down a stage is a residual block, the attention after it, or a downsampler alone; stage 0 is the first
    convolution. On the way up the upsampler belongs to the stage before it.
    """
    stages: dict[str, list[list[str]]] = {"input_blocks": [["conv_in"]], "output_blocks": []}
    for b, block in enumerate(unet.down_blocks):
        for n in range(len(block.resnets)):
            stages["input_blocks"].append(_residual_and_attention(block, f"down_blocks.{b}", n))
        if block.downsamplers is not None:
            stages["input_blocks"].append([f"down_blocks.{b}.downsamplers.0"])
    for b, block in enumerate(unet.up_blocks):
        for n in range(len(block.resnets)):
            stages["output_blocks"].append(_residual_and_attention(block, f"up_blocks.{b}", n))
        if block.upsamplers is not None:
            stages["output_blocks"][-1].append(f"up_blocks.{b}.upsamplers.0")
    places = {
        ours: f"{name}.{stage}.{place}"
        for name, members in stages.items()
        for stage, blocks in enumerate(members)
        for place, ours in enumerate(blocks)
    }
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    return places | {ours: f"middle_block.{place}" for place, ours in enumerate(middle)}


def _residual_and_attention(block: Any, path: str, n: int) -> list[str]:
    return [f"{path}.resnets.{n}"] + ([f"{path}.attentions.{n}"] if hasattr(block, "attentions") else [])


def ldm_names(unet: UNet2DConditionModel) -> set[str]:
    """What sd-scripts calls the modules of its own SDXL UNet."""
    inside_residual = {  # position in two nn.Sequential of (norm, activation[, dropout], convolution)
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    found = set()
    for ours, theirs in ldm_blocks(unet).items():
        for path, layer in unet.get_submodule(ours).named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or ours == "conv_in":
                continue
            if ".resnets." in ours:
                path = inside_residual[path]
            if ".downsamplers." in ours:
                path = "op"
            found.add(f"lora_unet.{theirs}.{path}".replace(".", "_"))
    return found


def is_convolution(name: str) -> bool:
    """Whether `conv_dim` is needed for it, in either spelling."""
    kinds = ("_resnets_", "samplers_", "_in_layers_", "_out_layers_", "_emb_layers_", "_skip_connection", "_0_op")
    return any(kind in name for kind in kinds) or name.endswith(("output_blocks_2_2_conv", "output_blocks_5_2_conv"))


def main() -> None:
    unet = make_unet(SDXL_UNET)
    first = text_encoder_names(make_text_encoder(CLIP_L), "lora_te1")
    second = text_encoder_names(make_text_encoder(CLIP_G, projects=True), "lora_te2")
    sdxl = ldm_names(unet)
    # The same layers as by class; only the names differ.
    assert len(sdxl) == len(names(unet, UNET_CLASSES, "lora_unet")) == 722 + 66
    assert sum(not is_convolution(name) for name in sdxl) == 722
    assert (len(first), len(second)) == (72, 192)
    SDXL_LIST.write_text("\n".join(sorted(sdxl | first | second)) + "\n", encoding="utf-8")

    sd21 = names(make_unet(SD21_UNET), UNET_CLASSES, "lora_unet")
    encoder = text_encoder_names(make_text_encoder(CLIP_H), "lora_te")
    assert (len(sd21), sum(is_convolution(name) for name in sd21), len(encoder)) == (278, 86, 138)
    SD21_LIST.write_text("\n".join(sorted(sd21 | encoder)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
