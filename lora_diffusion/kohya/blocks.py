"""Blocks of the UNet as networks.lora counts them, as regular expressions over module paths."""

from __future__ import annotations

import math
from collections.abc import Sequence

NUM_BLOCKS = {"sd": 25, "sdxl": 23}
SIDES = {"sd": (12, 1), "sdxl": (9, 3)}
"""How many blocks a side and the middle have.

SD 1.x and 2.x: 12 down, the middle, 12 up. SDXL: the embeddings, 9 down, 3 in the middle, 9 up, the last layers."""

CONVOLUTIONS = r"(\.conv[12]|samplers\.\d+\.conv)$"
"""The 3x3 convolutions, which networks.lora and LyCORIS give a rank of their own."""


def block_pattern(family: str, block: int, targets: str) -> str | None:
    """Which modules are in a block; None where none of them gets an adapter. targets: "attention-mlp" or "full"."""
    with_convolutions = targets == "full"
    if family == "sd":
        return _sd_block(block, with_convolutions)
    return _sdxl_block(block, with_convolutions)


def _sd_block(block: int, with_convolutions: bool) -> str | None:
    if block == 12:
        return r"^mid_block\."
    stage, place = divmod(block - 1 if block < 12 else block - 13, 3)
    if block == 0:
        return None  # the first convolution, which gets no adapter
    if block < 12:
        return _pattern("down", stage, place, has_attention=stage < 3 and place < 2, full=with_convolutions)
    return _pattern("up", stage, place, has_attention=stage > 0, full=with_convolutions, has_sampler=stage < 3)


def _sdxl_block(block: int, with_convolutions: bool) -> str | None:
    if block in (0, 1, 22):
        return None
    if block in (10, 11, 12):
        middle = (r"^mid_block\.resnets\.0\.", r"^mid_block\.attentions\.", r"^mid_block\.resnets\.1\.")[block - 10]
        return middle if with_convolutions or block == 11 else None
    if block < 10:
        stage, place = divmod(block - 2, 3)
        return _pattern("down", stage, place, has_attention=stage > 0 and place < 2, full=with_convolutions)
    stage, place = divmod(block - 13, 3)
    return _pattern("up", stage, place, has_attention=stage < 2, full=with_convolutions, has_sampler=stage < 2)


def _pattern(
    side: str, stage: int, place: int, *, has_attention: bool, full: bool, has_sampler: bool = False
) -> str | None:
    if not full:
        return rf"^{side}_blocks\.{stage}\.attentions\.{place}\." if has_attention else None
    if side == "down" and place == 2:
        return rf"^down_blocks\.{stage}\.downsamplers\."
    kinds = "(resnets|attentions)" if has_attention else "resnets"
    places = rf"^{side}_blocks\.{stage}\.{kinds}\.{place}\."
    return rf"{places}|^up_blocks\.{stage}\.upsamplers\." if has_sampler and place == 2 else places


def named_weights(text: str, count: int) -> list[float] | None:
    """The weights that `sine`, `cosine+0.2` … stand for, from the first block on; None for another name."""
    name, _, base = text.partition("+")
    rise = [i / (count - 1) for i in range(count)]
    curves: dict[str, Sequence[float]] = {
        "sine": [math.sin(math.pi * x / 2) for x in rise],
        "cosine": [math.cos(math.pi * x / 2) for x in rise],
        "linear": rise,
        "reverse_linear": rise[::-1],
        "zeros": [0.0] * count,
    }
    try:
        return [round(value + float(base or 0), 6) for value in curves[name]]
    except (KeyError, ValueError):
        return None
