"""Factors for parts of a model: `unet.up_blocks.1=0.5` for every adapter, `2:attn2=0` for the second one only."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora_diffusion.errors import UserError
from lora_diffusion.tools.plain_lora import dotted_name

_TEXT = re.compile(r"(?:(?P<adapter>\d{1,4}):)?(?P<pattern>.+)=(?P<factor>[^=]+)")


@dataclass(frozen=True)
class BlockWeight:
    """A factor for the modules whose dotted name the pattern is found in. adapter: from 1, or None for all of them."""

    text: str
    pattern: re.Pattern[str]
    factor: float
    adapter: int | None = None

    def applies(self, adapter: int, name: str) -> bool:
        """adapter: from 1. name: canonical."""
        return self.adapter in (None, adapter) and self.pattern.search(dotted_name(name)) is not None


def parse_block_weight(text: str) -> BlockWeight:
    """`PATTERN=FACTOR` or `2:PATTERN=FACTOR`; PATTERN is a regular expression over dotted module names.

    Raises UserError for anything else. A factor of 0 leaves the modules out.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise UserError(f"--block-weight {text}: not PATTERN=FACTOR. Write it like unet.up_blocks.1=0.5 or 2:attn2=0.")
    try:
        factor = float(match["factor"])
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UserError(f"--block-weight {text}: {match['factor']!r} is not a number. Write it like attn2=0.5.")
    try:
        pattern = re.compile(match["pattern"])
    except re.error as error:
        raise UserError(
            f"--block-weight {text}: {match['pattern']!r} is no regular expression ({error}). Mend it, or put a "
            "backslash before characters that stand for themselves."
        ) from None
    return BlockWeight(text, pattern, factor, int(match["adapter"]) if match["adapter"] else None)


def check_block_weights(weights: Sequence[BlockWeight], adapters: Sequence[Collection[str]]) -> None:
    """Raises UserError for one that names no adapter or matches no module; adapters: canonical module names of each."""
    for weight in weights:
        if weight.adapter is not None and not 1 <= weight.adapter <= len(adapters):
            raise UserError(
                f"--block-weight {weight.text}: there is no adapter {weight.adapter}; they are counted from 1 to "
                f"{len(adapters)} in the order given."
            )
        names = [(i, name) for i, modules in enumerate(adapters, 1) for name in modules]
        if not any(weight.applies(i, name) for i, name in names):
            example = dotted_name(next(name for i, name in names if weight.adapter in (None, i)))
            raise UserError(
                f"--block-weight {weight.text}: no module's name matches {weight.pattern.pattern!r}. Names look like "
                f"{example}."
            )


def block_factor(weights: Sequence[BlockWeight], adapter: int, name: str) -> float:
    """The product of all factors that apply to a module of an adapter, counted from 1."""
    return math.prod(weight.factor for weight in weights if weight.applies(adapter, name))
