"""Adapters in a prompt: the text is the truth, sliders and chips only edit it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lora_diffusion.generation.request import format_number

TAG = re.compile(r"<lora:(?P<name>[^<>:]+)(?::(?P<strengths>[^<>]*))?>")
STEP = 0.05


@dataclass(frozen=True)
class Tagged:
    """One adapter of a prompt. strength is None while what stands in the tag is no number."""

    name: str
    strength: float | None


def stack_of(prompt: str) -> list[Tagged]:
    """The adapters of `prompt` in their order; one that is tagged twice has its strengths added, as it is drawn."""
    strengths: dict[str, float | None] = {}
    for match in TAG.finditer(prompt):
        name, value = match["name"].strip(), _strength(match["strengths"])
        before = strengths.get(name, 0.0)
        strengths[name] = None if value is None or before is None else before + value
    return [Tagged(name, strength) for name, strength in strengths.items()]


def set_strength(prompt: str, name: str, strength: float) -> str:
    """The prompt with that strength in the adapter's tag, which stays where it is; a new tag goes to the end."""
    tag = f"<lora:{name}:{format_number(round(strength, 4))}>"
    written = False

    def replace(match: re.Match[str]) -> str:
        nonlocal written
        if match["name"].strip() != name:
            return match[0]
        if written:
            return ""
        written = True
        return tag

    changed = TAG.sub(replace, prompt)
    if written:
        return changed
    return f"{prompt.rstrip()} {tag}".lstrip()


def without(prompt: str, name: str) -> str:
    """The prompt without the adapter's tags and the space before each."""
    return re.sub(rf" ?{TAG.pattern}", lambda match: "" if match["name"].strip() == name else match[0], prompt).lstrip()


def toggle_words(prompt: str, words: str) -> str:
    """Put trigger words in front of the prompt, or take them out if they are in it."""
    parts = _parts(prompt)
    wanted = words.strip().lower()
    kept = [part for part in parts if part.strip().lower() != wanted]
    if len(kept) < len(parts):
        return ",".join(kept).lstrip(" ,")
    return f"{words.strip()}, {prompt.lstrip()}" if prompt.strip() else words.strip()


def has_words(prompt: str, words: str) -> bool:
    wanted = words.strip().lower()
    return any(part.strip().lower() == wanted for part in _parts(prompt))


def _parts(prompt: str) -> list[str]:
    return prompt.split(",")


def _strength(text: str | None) -> float | None:
    if text is None:
        return 1.0
    try:
        values = {float(part) for part in text.split(":")}
    except ValueError:
        return None
    value = values.pop()
    return value if not values and math.isfinite(value) else None
