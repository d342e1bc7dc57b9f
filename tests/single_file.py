"""A tiny diffusers folder as one LDM checkpoint file, the form in which most models are shared.

Written without the package's own table of names, so that the two check each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


OPENCLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPENCLIP_LAYER |= {"self_attn.out_proj": "attn.out_proj"}


def make_single_file(
    folder: Path,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes the weights of the diffusers `folder` to `path` under the names of the original Stable Diffusion code.

    dtype: None keeps that of the folder. extra: further tensors.
    """
    config = json.loads((folder / "unet" / "config.json").read_text())
    family = "sdxl" if config.get("addition_embed_type") else "sd2" if config["use_linear_projection"] else "sd1"
    layers = config["layers_per_block"]
    plain_up = config["up_block_types"].index("UpBlock2D")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors["model.diffusion_model." + _unet_name(name, layers, plain_up)] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        renamed = "first_stage_model." + _vae_name(name, levels=_vae_levels(folder))
        is_matrix = tensor.ndim == 2 and ".attn_1." in renamed
        tensors[renamed] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    if family == "sd2":
        num_layers = json.loads((folder / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
        converted = _openclip(encoder)
        last = f"transformer.resblocks.{num_layers - 1}."
        converted |= {  # the layer that the published files carry and the model does not use
            name.replace(last, f"transformer.resblocks.{num_layers}."): torch.zeros_like(tensor)
            for name, tensor in converted.items()
            if name.startswith(last)
        }
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in converted.items()}
    else:
        prefix = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        tensors |= {f"{prefix}.transformer.{name}": tensor for name, tensor in encoder.items()}
    if family == "sdxl":
        second = _openclip(load_file(folder / "text_encoder_2" / "model.safetensors"))
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file({name: t.contiguous() for name, t in (tensors | dict(extra or {})).items()}, path, metadata)
    return path


def _openclip(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIP text encoder as OpenCLIP keeps them: q, k and v in one."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.items()}
    converted = {
        "token_embedding.weight": weights.pop("embeddings.token_embedding.weight"),
        "positional_embedding": weights.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": weights.pop("final_layer_norm.weight"),
        "ln_final.bias": weights.pop("final_layer_norm.bias"),
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in weights:
        converted["text_projection"] = weights.pop("text_projection.weight").T
    for name in list(weights):
        layer, _, rest = name.removeprefix("encoder.layers.").partition(".")
        stem, _, kind = rest.rpartition(".")
        if stem == "self_attn.q_proj":
            stacked = [weights[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            converted[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(stacked)
        elif stem in OPENCLIP_LAYER:
            converted[f"transformer.resblocks.{layer}.{OPENCLIP_LAYER[stem]}.{kind}"] = weights[name]
    return converted


def _unet_name(name: str, layers: int, plain_up: int) -> str:
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
    return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == plain_up else 2}.conv.{match[2]}"


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
