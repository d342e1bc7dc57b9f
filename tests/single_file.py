"""A tiny diffusers folder as one LDM checkpoint file, the form in which most SD 1.x models are shared."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def make_single_file(folder: Path, path: Path) -> Path:
    """Writes the weights of the diffusers `folder` to `path` under the names of the first Stable Diffusion release."""
    unet_config = json.loads((folder / "unet" / "config.json").read_text())
    layers, levels = unet_config["layers_per_block"], len(unet_config["block_out_channels"])
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors["model.diffusion_model." + _unet_name(name, layers)] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        renamed = "first_stage_model." + _vae_name(name, levels=_vae_levels(folder))
        is_matrix = tensor.ndim == 2 and ".attn_1." in renamed
        tensors[renamed] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors["cond_stage_model.transformer." + name] = tensor
    assert levels == 4
    save_file(tensors, path)
    return path


def _unet_name(name: str, layers: int) -> str:
    for ours, theirs in UNET_TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name)
    if match:
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        index = block * (layers + 1) + layer + (1 if side == "down" else 0)
        stem = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{'0' if kind == 'resnets' else '1'}"
        return f"{stem}.{_resnet(rest) if kind == 'resnets' else rest}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        rest = _resnet(match[3]) if match[1] == "resnets" else match[3]
        return f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{rest}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    match = re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.+)", name)
    assert match, name
    block = int(match[1])
    return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == 0 else 2}.conv.{match[2]}"


def _resnet(rest: str) -> str:
    layer, _, tail = rest.rpartition(".")
    return f"{RESNET[layer]}.{tail}"


def _vae_levels(folder: Path) -> int:
    return len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    if match := re.fullmatch(r"(.+)mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name
