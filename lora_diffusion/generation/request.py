"""What to draw, as plain values, and the `<lora:name:0.8>` tags that people write into prompts (no torch)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_diffusion.errors import UserError

_TAG = re.compile(r" ?<lora:(?P<name>[^<>:]+)(?::(?P<strengths>[^<>]*))?>")
_NOT_IN_NAMES = re.compile(r'[<>:,"\x00-\x1f\x7f\ud800-\udfff]')
_HALVES = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Request:
    """One picture. Requests are values: the same request gives the same picture, whatever else is drawn beside it."""

    prompt: str
    """May hold `<lora:name:0.8>` tags; they are taken out before the text is encoded."""
    negative: str = ""
    """What to steer away from. Has no effect at `cfg` 1."""
    seed: int = 0
    steps: int = 25
    cfg: float = 7.0
    """Guidance scale, at least 1; 1 follows the plain prediction and costs half the time."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None is the model's own size."""
    sampler: str = "ddim"
    """A key of `SAMPLERS`."""
    clip_skip: int = 1
    """1 is the text encoder's last layer."""
    adapters: Mapping[str, float] = field(default_factory=dict[str, float])
    """Strength per loaded adapter. Where the prompt has a tag of the same name, the tag's strength counts."""


def take_out_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its `<lora:name:strength>` tags, and their strengths.

    A tag goes with the one space before it. No strength means 1; a name tagged twice has its strengths added, as two
    copies of the adapter would be. Raises UserError on a strength that is not a finite number.
    """
    strengths: dict[str, float] = {}
    for match in _TAG.finditer(prompt):
        name = match["name"].strip()
        strengths[name] = strengths.get(name, 0.0) + _strength(match)
    return _TAG.sub("", prompt), strengths


def resolve_tags(request: Request) -> Request:
    """The same picture with a prompt free of tags: they move to `adapters`, over entries of the same name."""
    prompt, strengths = take_out_tags(request.prompt)
    return replace(request, prompt=prompt, adapters={**request.adapters, **strengths})


def write_tags(adapters: Mapping[str, float]) -> str:
    """`<lora:ink:0.8> <lora:neon:1>`, in the order of the mapping."""
    return " ".join(f"<lora:{name}:{format_number(strength)}>" for name, strength in adapters.items())


def check_adapter_name(name: str) -> str:
    """Returns the name. Raises UserError when it could not stand in a `<lora:name:1>` tag."""
    found = _NOT_IN_NAMES.search(name)
    if found or not name or name != name.strip():
        reason = f"contains {found[0]!r}" if found else "is empty or begins or ends with a space"
        raise UserError(
            f"Adapter name {name!r} {reason}. Names are used in prompts as <lora:name:1>: "
            'choose one without < > : , " and line breaks.'
        )
    return name


def adapter_name(stem: str) -> str:
    """A valid adapter name from a file's stem: characters that tags cannot hold become `_`."""
    return check_adapter_name(_NOT_IN_NAMES.sub("_", stem).strip() or "_")


def check_file_name(path: Path) -> None:
    """Raises UserError for an adapter file whose name is not UTF-8: no prompt and no picture could say it."""
    if _HALVES.search(path.name):
        raise UserError(f"{without_halves(str(path))}: the name is not valid UTF-8; rename it.")


def without_halves(text: str) -> str:
    """The text with halves of surrogate pairs, which no UTF-8 can hold, replaced by the sign for that."""
    return _HALVES.sub("\ufffd", text)


def format_number(value: float) -> str:
    """The shortest text that reads back as the same number: `7`, `0.8`."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _strength(match: re.Match[str]) -> float:
    text = match["strengths"]
    if text is None:
        return 1.0
    parts = [part.strip() for part in text.split(":")]
    try:
        values = {float(part) for part in parts}
    except ValueError:
        values = {math.nan}
    if len(values) > 1:
        raise UserError(
            f"{match[0].strip()}: separate strengths for the text encoder and the UNet are not supported. "
            "Write one strength, as in <lora:name:0.8>."
        )
    value = values.pop()
    if not math.isfinite(value):
        raise UserError(f"{match[0].strip()}: {text!r} is not a number. Write the strength as in <lora:name:0.8>.")
    return value
