"""What weights are called in single-file checkpoints: the names of the first Stable Diffusion release, and OpenCLIP's.

Everything else in this package uses the names of diffusers and transformers. Strings only: no model is needed. The
UNet's names work for module paths and for tensor names alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = (
    (r"\bmid_block\.resnets\.0\b", r"mid.block_1"),
    (r"\bmid_block\.resnets\.1\b", r"mid.block_2"),
    (r"\bmid_block\.attentions\.0\.group_norm\b", r"mid.attn_1.norm"),
    (r"\bmid_block\.attentions\.0\.to_(q|k|v)\b", r"mid.attn_1.\1"),
    (r"\bmid_block\.attentions\.0\.to_out\.0\b", r"mid.attn_1.proj_out"),
    (r"\bdown_blocks\.(\d)\.resnets\b", r"down.\1.block"),
    (r"\bdown_blocks\.(\d)\.downsamplers\.0\b", r"down.\1.downsample"),
    (r"\bconv_norm_out\b", r"norm_out"),
    (r"\bconv_shortcut\b", r"nin_shortcut"),
)
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ENCODER_PREFIXES = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}
"""(family, part) → what the part's tensor names begin with. Those that end in "model." hold OpenCLIP names."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is kept: its key, and how that entry differs from it.

    third: OpenCLIP stacks the rows of q, k and v; 0, 1 or 2 says which third of the rows it is. is_transposed: rows and
    columns are swapped there.
    """

    key: str
    third: int | None = None
    is_transposed: bool = False


def unet_to_ldm(name: str, *, layers_per_block: int = 2, plain_up_blocks: Collection[int] = ()) -> str:
    """The LDM name: "input_blocks.4.1.proj_in" for "down_blocks.1.attentions.0.proj_in".

    plain_up_blocks: numbers of the up blocks without attention; there the upsampler comes one place earlier (0 in
    SD 1.x and 2.x; none that matters in SDXL). Raises ValueError for a name that no such UNet has.
    """
    for ours, theirs in _UNET_TOP.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        index = block * (layers_per_block + 1) + layer + (1 if side == "down" else 0)
        stem = f"{'input' if side == 'down' else 'output'}_blocks.{index}"
        return f"{stem}.0.{_swap(rest, _RESNET)}" if kind == "resnets" else f"{stem}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_swap(match[3], _RESNET)}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv(\..+)?", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers_per_block + 1)}.0.op{match[2] or ''}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv(\..+)?", name):
        block = int(match[1])
        index = block * (layers_per_block + 1) + layers_per_block
        return f"output_blocks.{index}.{1 if block in plain_up_blocks else 2}.conv{match[2] or ''}"
    raise ValueError(f"{name} is no module of a Stable Diffusion UNet")


def unet_from_ldm(name: str, *, layers_per_block: int = 2) -> str:
    """The inverse of `unet_to_ldm`, whatever the plain up blocks are. Raises ValueError for any other name."""
    for ours, theirs in _UNET_TOP.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    from_resnet = {theirs: ours for ours, theirs in _RESNET.items()}
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name):
        is_down, place, rest = match[1] == "input", int(match[3]), match[4]
        block, layer = divmod(int(match[2]) - is_down, layers_per_block + 1)
        stem = f"{'down' if is_down else 'up'}_blocks.{block}"
        if is_down and layer == layers_per_block and rest.partition(".")[0] == "op":
            return f"{stem}.downsamplers.0.conv{rest.removeprefix('op')}"
        if not is_down and place and rest.partition(".")[0] == "conv":
            return f"{stem}.upsamplers.0.{rest}"
        if place == 0:
            return f"{stem}.resnets.{layer}.{_swap(rest, from_resnet)}"
        return f"{stem}.attentions.{layer}.{rest}"
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        if match[1] == "1":
            return f"mid_block.attentions.0.{match[2]}"
        return f"mid_block.resnets.{int(match[1]) // 2}.{_swap(match[2], from_resnet)}"
    raise ValueError(f"{name} is no module of a Stable Diffusion UNet in LDM names")


def vae_to_ldm(name: str, *, levels: int = 4) -> str:
    """The LDM name of a VAE tensor: "decoder.up.3.block.1.…" for "decoder.up_blocks.0.resnets.1.…".

    The attention's weights are 1x1 convolutions (C, C, 1, 1) there and matrices (C, C) in diffusers.
    """
    for ours, theirs in _VAE:
        name = re.sub(ours, theirs, name)
    name = re.sub(r"\bup_blocks\.(\d)\.resnets\b", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"\bup_blocks\.(\d)\.upsamplers\.0\b", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def with_text_model(name: str) -> str:
    """A module or tensor of a CLIP text encoder with the level that files have and transformers 5 dropped."""
    return f"text_model.{name}" if name.startswith(("encoder.", "embeddings.", "final_layer_norm.")) else name


def openclip_place(name: str) -> Place:
    """Where OpenCLIP keeps a tensor of transformers' CLIP text encoder; `name` with or without "text_model.".

    Raises ValueError for a name that no such encoder has.
    """
    name = name.removeprefix("text_model.")
    if name in _OPENCLIP_TOP:
        return Place(_OPENCLIP_TOP[name])
    if name == "text_projection.weight":
        return Place("text_projection", is_transposed=True)
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        stem, layer, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if layer in _OPENCLIP_LAYER:
            return Place(f"{stem}.{_OPENCLIP_LAYER[layer]}.{kind}")
        if layer in (thirds := ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
            return Place(f"{stem}.attn.in_proj_{kind}", third=thirds.index(layer))
    raise ValueError(f"{name} is no tensor of a CLIP text encoder")


def place_in_single_file(
    family: str,
    part: str,
    name: str,
    *,
    layers_per_block: int = 2,
    plain_up_blocks: Collection[int] = (),
    vae_levels: int = 4,
) -> Place:
    """Where a single-file checkpoint of `family` keeps the tensor `name` of "unet", "vae", "text_encoder", …

    Raises ValueError for a part that the family lacks or a name that the part lacks.
    """
    if part == "unet":
        key = unet_to_ldm(name, layers_per_block=layers_per_block, plain_up_blocks=plain_up_blocks)
        return Place(UNET_PREFIX + key)
    if part == "vae":
        return Place(VAE_PREFIX + vae_to_ldm(name, levels=vae_levels))
    prefix = TEXT_ENCODER_PREFIXES.get((family, part))
    if prefix is None:
        raise ValueError(f"a checkpoint of family {family!r} has no part {part!r}")
    if prefix.endswith("transformer."):
        return Place(prefix + with_text_model(name))
    place = openclip_place(name)
    return Place(prefix + place.key, place.third, place.is_transposed)


def _swap(rest: str, names: dict[str, str]) -> str:
    """`rest` with its first step(s) renamed; it may go on with ".weight" or end there."""
    for old, new in names.items():
        if rest == old or rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    raise ValueError(f"{rest} is no layer of a residual block")
