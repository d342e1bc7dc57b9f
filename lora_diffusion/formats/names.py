"""What modules are called in adapter files: kohya names (underscores, flat) and PEFT names (dotted paths).

The kohya name is the one used inside this package. Strings only: no model is needed to translate.
"""

from __future__ import annotations

import re

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
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2"),
)
"""The steps of a module path below a UNet or CLIP text encoder of diffusers and transformers; numbers come on top."""

_SEGMENT = re.compile(rf"({'|'.join(sorted(SEGMENTS, key=len, reverse=True))}|\d+)(?:_|$)")
_PEFT_KEY = re.compile(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_OLD_KEY = re.compile(
    r"(?:\.processor)?\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<matrix>down|up)\.weight$"  # before diffusers 0.22
    r"|\.lora(?:_linear_layer)?\.(?P<later>down|up)\.weight$"  # until 0.24, and for text encoders
)
_CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def kohya_name(prefix: str, path: str) -> str:
    """("lora_unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"."""
    return f"{prefix}_{path}".replace(".", "_")


def split_kohya_name(name: str) -> tuple[str, str]:
    """The prefix and the dotted path of a kohya module name; the inverse of `kohya_name`.

    ValueError if the name does not consist of known steps (the LDM spelling of SDXL files, for one).
    """
    prefix = next((p for p in PEFT_PREFIXES if name.startswith(f"{p}_")), None)
    if prefix is None:
        raise ValueError(f"{name} begins with none of {', '.join(PEFT_PREFIXES)}")
    rest, steps = name.removeprefix(f"{prefix}_"), []
    while rest:
        match = _SEGMENT.match(rest)
        if match is None:
            raise ValueError(f"{name}: {rest!r} is no module of a diffusers UNet or CLIP text encoder")
        steps.append(match[1])
        rest = rest[match.end() :]
    return prefix, ".".join(steps)


def peft_name(name: str) -> str:
    """A kohya module name as the dotted PEFT name, with its component: "unet.mid_block.attentions.0.proj_in"."""
    prefix, path = split_kohya_name(name)
    return f"{PEFT_PREFIXES[prefix]}.{path}"


def from_peft_key(key: str, *, two_encoders: bool = False) -> tuple[str, str] | None:
    """A tensor key of a PEFT or older diffusers file as (kohya module name, "lora_down.weight" or "lora_up.weight").

    two_encoders: the file also has a `text_encoder_2`, so that `text_encoder` is `lora_te1`. None for any other key.
    """
    key = _modern(key)
    match = _PEFT_KEY.fullmatch(key)
    if match is None:
        return None
    component, path, matrix = match.groups()
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if two_encoders else "lora_te"}.get(component, "lora_te2")
    if component != "unet" and not path.startswith("text_model."):
        path = f"text_model.{path}"  # transformers 5 module paths lack a level that every reader of kohya files expects
    return kohya_name(prefix, path), "lora_down.weight" if matrix == "A" else "lora_up.weight"


def _modern(key: str) -> str:
    """The present-day PEFT spelling of a key from an older diffusers."""
    match = _OLD_KEY.search(key)
    if match is None:
        return key
    layer = match["layer"]
    if layer and key.startswith("text_encoder"):
        layer = _CLIP_LAYERS[layer]
    elif layer == "to_out":
        layer = "to_out.0"
    path = key[: match.start()] + (f".{layer}" if layer else "")
    return f"{path}.lora_{'A' if (match['matrix'] or match['later']) == 'down' else 'B'}.weight"
