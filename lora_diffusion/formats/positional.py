"""The first LoRA files for Stable Diffusion (2022), whose layers are numbered in the order the program met them.

Keys are `unet:<n>:down`, `text_encoder:<n>:up` and so on, for SD 1.x only; there is no alpha, which means scale 1. The
order is that of the modules of diffusers 0.9 and transformers 4: down blocks, up blocks, then the middle, and in each
transformer block attn1, the feed-forward's first layer, attn2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from lora_diffusion.adapters.geometry import DOWN, UP
from lora_diffusion.formats.names import kohya_name

POSITIONAL_KEY = re.compile(r"(unet|text_encoder):(\d{1,4}):(down|up)")


def place_of_positional_key(key: str) -> tuple[str, str] | None:
    """(canonical module name, part) of a key, or None for any other key or a number that SD 1.x does not have."""
    match = POSITIONAL_KEY.fullmatch(key)
    if match is None:
        return None
    names = _names(match[1])
    number = int(match[2])
    return (names[number], DOWN if match[3] == "down" else UP) if number < len(names) else None


@cache
def _names(part: str) -> tuple[str, ...]:
    return tuple(_unet() if part == "unet" else _text_encoder())


def _unet() -> Iterator[str]:
    """The 144 layers: four projections of each of two attentions and one feed-forward layer, in 16 blocks."""
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    blocks += ["mid_block.attentions.0"]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [*(f"attn1.{x}" for x in attention), "ff.net.0.proj", *(f"attn2.{x}" for x in attention)]
    for block in blocks:
        yield from (kohya_name("lora_unet", f"{block}.transformer_blocks.0.{layer}") for layer in layers)


def _text_encoder() -> Iterator[str]:
    """The 48 layers of CLIP ViT-L/14's attention, in the order in which transformers defines them."""
    for i in range(12):
        for layer in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield kohya_name("lora_te", f"text_model.encoder.layers.{i}.self_attn.{layer}")
