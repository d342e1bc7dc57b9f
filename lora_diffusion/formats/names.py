"""What modules are called in adapter files: kohya names (underscores, flat) and PEFT names (dotted paths).

Inside this package a module has its canonical name: the kohya name with the UNet's blocks as diffusers calls them, for
every family. Files for SDXL spell the UNet the LDM way instead, as sd-scripts does. Strings only: no model is needed.
"""

from __future__ import annotations

import re

from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, DOWN, UP
from lora_diffusion.ldm_names import unet_from_ldm, unet_to_ldm, with_text_model

PEFT_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
"""Kohya prefix -> the pipeline component that PEFT names begin with."""

SEGMENTS = (
    *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("transformer_blocks", "proj_in", "proj_out", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out"),
    *("ff", "net", "proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("op", "time_embed", "label_emb", "out"),
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2"),
    "text_projection",
)
"""The steps of a module path below a UNet or CLIP text encoder, in names of diffusers, transformers and LDM; numbers
come on top."""

_SEGMENT = re.compile(rf"({'|'.join(sorted(SEGMENTS, key=len, reverse=True))}|\d+)(?:_|$)")
_LDM_START = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
_PEFT_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:(unet|text_encoder|text_encoder_2)\.)?(.+)\."
    r"(lora_[AB](?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?|alpha)"
)
_LYCORIS_PREFIX = "lycoris_"  # of the LyCORIS library outside kohya's trainer; it means the UNet
_OLD_KEY = re.compile(
    r"(?:\.processor)?\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<matrix>down|up)\.weight$"  # before diffusers 0.22
    r"|\.lora(?:_linear_layer)?\.(?P<later>down|up)\.weight$"  # until 0.24, and for text encoders
    r"|\.processor\.(?P<scaled>to_q|to_k|to_v|to_out)\.alpha$"  # beside the first, as ComfyUI looks for it
)
_CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def canonical_name(name: str) -> str:
    """The kohya name of a module with the blocks of diffusers, whatever spelling `name` has.

    A name that is no module of a Stable Diffusion UNet or CLIP text encoder comes back as it is.
    """
    if name.startswith(_LYCORIS_PREFIX):
        name = f"lora_unet_{name.removeprefix(_LYCORIS_PREFIX)}"
    path = name.removeprefix("lora_unet_")
    if path == name or not _LDM_START.match(path):
        return name
    try:
        return kohya_name("lora_unet", unet_from_ldm(_dotted(path)))
    except ValueError:
        return name


def name_in_file(name: str, family: str) -> str:
    """How a kohya file for `family` spells the module with this canonical name: the UNet of SDXL the LDM way."""
    if family != "sdxl" or not name.startswith("lora_unet_"):
        return name
    try:
        return kohya_name("lora_unet", unet_to_ldm(split_kohya_name(name)[1]))
    except ValueError:
        return name


def usual_name(name: str, family: str) -> str:
    """The canonical name that every reader looks for, where some program wrote this module under a rarer one.

    The one text encoder of SD 1.x and 2.x is `lora_te`, the first of SDXL `lora_te1`, and both have a `text_model`.
    """
    if family == "sdxl":
        name = re.sub(r"^lora_te_", "lora_te1_", name)
    elif family:
        name = re.sub(r"^lora_te1_", "lora_te_", name)
    return re.sub(r"^(lora_te[12]?)_encoder_layers_", r"\1_text_model_encoder_layers_", name)


def kohya_name(prefix: str, path: str) -> str:
    """("lora_unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"."""
    return f"{prefix}_{path}".replace(".", "_")


def split_kohya_name(name: str) -> tuple[str, str]:
    """The prefix and the dotted path of a kohya module name; the inverse of `kohya_name`.

    ValueError if the name does not consist of known steps.
    """
    prefix = next((p for p in PEFT_PREFIXES if name.startswith(f"{p}_")), None)
    if prefix is None:
        raise ValueError(f"{name} begins with none of {', '.join(PEFT_PREFIXES)}")
    return prefix, _dotted(name.removeprefix(f"{prefix}_"))


def _dotted(flat: str) -> str:
    """The path that a flat name stands for: "mid_block.proj_in" for "mid_block_proj_in". Raises ValueError."""
    rest, steps = flat, []
    while rest:
        match = _SEGMENT.match(rest)
        if match is None:
            raise ValueError(f"{flat}: {rest!r} is no module of a Stable Diffusion UNet or CLIP text encoder")
        steps.append(match[1])
        rest = rest[match.end() :]
    return ".".join(steps)


def peft_name(name: str) -> str:
    """A canonical module name as the dotted PEFT name, with its component: "unet.mid_block.attentions.0.proj_in"."""
    prefix, path = split_kohya_name(name)
    return f"{PEFT_PREFIXES[prefix]}.{path}"


def from_peft_key(key: str, *, two_encoders: bool = False) -> tuple[str, str] | None:
    """A tensor key of a PEFT or older diffusers file as (canonical module name, part: "lora_down.weight", …).

    two_encoders: the file is for a model with a `text_encoder_2`, so that `text_encoder` is `lora_te1`. None for any
    other key.
    """
    place = _place_of_peft_key(key)
    if place is None:
        return None
    component, path, tensor = place
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if two_encoders else "lora_te"}.get(component, "lora_te2")
    part = ALPHA if tensor == ALPHA else {"A": DOWN, "B": UP}.get(tensor.removeprefix("lora_")[0], DORA_SCALE)
    return kohya_name(prefix, path), part


def peft_module(key: str) -> tuple[str, str]:
    """(component, dotted path below it) of a key that `from_peft_key` reads, also where no base has such a module."""
    place = _place_of_peft_key(key)
    if place is None:
        raise ValueError(f"{key} is no key of a PEFT file")
    return place[:2]


def _place_of_peft_key(key: str) -> tuple[str, str, str] | None:
    """(component, dotted path below it, how the key ends) of a tensor key of a PEFT or older diffusers file."""
    match = _PEFT_KEY.fullmatch(_modern(key))
    if match is None:
        return None
    component, path, tensor = match.groups()
    component = component or _component_of(path)
    if component is None:
        return None
    return component, path if component == "unet" else with_text_model(path), tensor


def _component_of(path: str) -> str | None:
    """The component that a path without one is in: files of a single PEFT model have such names."""
    first = path.partition(".")[0]
    if first in ("down_blocks", "mid_block", "up_blocks"):
        return "unet"
    return "text_encoder" if first in ("text_model", "encoder") else None


def _modern(key: str) -> str:
    """The present-day PEFT spelling of a key from an older diffusers."""
    match = _OLD_KEY.search(key)
    if match is None:
        return key
    layer = match["layer"] or match["scaled"]
    if layer and key.startswith("text_encoder"):
        layer = _CLIP_LAYERS[layer]
    elif layer == "to_out":
        layer = "to_out.0"
    path = key[: match.start()] + (f".{layer}" if layer else "")
    if match["scaled"]:
        return f"{path}.{ALPHA}"
    return f"{path}.lora_{'A' if (match['matrix'] or match['later']) == 'down' else 'B'}.weight"
