"""The fields of the page Generate as a request, and a request as fields."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, fields, replace

from lora_diffusion.errors import UserError
from lora_diffusion.generation.request import Request, resolve_tags
from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.generation.sheet import AXES, MAX_PROMPT_LENGTH, Axis, Sheet, parse_axis
from webui.services.kept import kept_values

MAX_SIDE_PX = 2048
FIRST_PROMPT = "a red house under a yellow sun"
"""What the shipped base and adapters can draw."""
SEED_MODES = ("random", "fixed", "next")
AXIS_FIELDS = ("x_name", "x_values", "y_name", "y_values")
"""The fields of a grid."""


@dataclass(frozen=True)
class DrawingForm:
    """What the fields hold. Numbers are as the browser sent them: anything."""

    prompt: str
    negative: str
    steps: object
    cfg: object
    sampler: str
    clip_skip: object
    count: object
    width: object
    height: object
    seed: object
    seed_mode: str

    def requests(self) -> list[Request]:
        """One per picture, with seeds in a row. Raises UserError that names the field."""
        first = self.request()
        count = _whole(self.count, "Pictures", 1, 64)
        return [replace(first, seed=first.seed + index) for index in range(count)]

    def request(self) -> Request:
        """The first picture; a random seed is drawn here. Tags have moved from the prompt to the adapters."""
        if len(self.prompt) > MAX_PROMPT_LENGTH or len(self.negative) > MAX_PROMPT_LENGTH:
            raise UserError(f"A prompt has at most {MAX_PROMPT_LENGTH} characters.")
        seed = secrets.randbelow(2**32) if self.seed_mode == "random" else _whole(self.seed, "Seed", 0, 2**62)
        return resolve_tags(
            Request(
                prompt=self.prompt.strip(),
                negative=self.negative.strip(),
                seed=seed,
                steps=_whole(self.steps, "Steps", 1, 200),
                cfg=_number(self.cfg, "Guidance", 1, 100),
                size=(_whole(self.width, "Width", 8, MAX_SIDE_PX), _whole(self.height, "Height", 8, MAX_SIDE_PX)),
                sampler=self.sampler,
                clip_skip=_whole(self.clip_skip, "CLIP skip", 1, 24),
            )
        )

    def sheet(self, x: tuple[str, str], y: tuple[str, str]) -> Sheet:
        """x, y: name and values of each axis; the name of y is "" for none. Raises UserError."""
        return Sheet(self.request(), _axis(x, "X"), _axis(y, "Y") if y[0] in AXES else None)


def fields_from_json(text: str) -> dict[str, object]:
    """What a browser kept of the base, the fields and the axes of the grid, by name."""
    return kept_values(text, ("base", *(field.name for field in fields(DrawingForm)), *AXIS_FIELDS), _fits)


def _fits(name: str, value: object) -> bool:
    match name:
        case "sampler":
            return isinstance(value, str) and value in SAMPLERS
        case "seed_mode":
            return value in SEED_MODES
        case "x_name" | "y_name":
            return isinstance(value, str) and (value in AXES or (name == "y_name" and value == ""))
        case "base" | "prompt" | "negative" | "x_values" | "y_values":
            return isinstance(value, str) and len(value) <= MAX_PROMPT_LENGTH
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _axis(axis: tuple[str, str], letter: str) -> Axis:
    return parse_axis(f"{axis[0]}={axis[1]}", letter)


def next_seed(form: DrawingForm, drawn: list[Request]) -> int:
    """What the seed field shows after drawing."""
    return drawn[-1].seed + 1 if form.seed_mode == "next" else drawn[0].seed


def _number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: this is no number.")
    if not low <= value <= high:
        raise UserError(f"{name} is {value:g}; it must be from {low:g} to {high:g}.")
    return float(value)


def _whole(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        _number(value, name, low, high)
        return value
    number = _number(value, name, low, high)
    if not number.is_integer():
        raise UserError(f"{name} is {number:g}; it must be a whole number.")
    return int(number)
