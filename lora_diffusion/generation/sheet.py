"""XY(Z) sheets: one request with some of its settings varied along axes, drawn cell by cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.generation.grid import contact_sheet, stacked
from lora_diffusion.generation.infotext import add_fields, write_parameters
from lora_diffusion.generation.request import Request, format_number, resolve_tags
from lora_diffusion.generation.samplers import sampler_named

if TYPE_CHECKING:
    from lora_diffusion.generation.engine import Engine, OnStep

NONE = "none"
"""The value of the axes adapter and checkpoint that stands for the base alone."""
MAX_CELLS = 400
MAX_PROMPT_LENGTH = 10_000  # characters, of one that is typed and of one in which the axis prompt has replaced its term


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as text: "strength" with ("0", "0.5", "1")."""

    name: str
    values: tuple[str, ...]

    def label(self, value: str) -> str:
        """What stands beside a row or column."""
        return value if self.name in _SPEAK_FOR_THEMSELVES else f"{self.name} {value}"


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet: its place along x, y and z, and what is drawn there."""

    x: int
    y: int
    z: int
    request: Request


@dataclass(frozen=True)
class Sheet:
    """What to draw. An axis that is missing has one place; its setting is the request's own."""

    request: Request
    x: Axis
    y: Axis | None = None
    z: Axis | None = None

    def cells(self, check: Callable[[Request], None] = lambda _: None) -> list[Cell]:
        """All cells, row by row, free of tags. Where the seed is the same, so is the noise: only the settings differ.

        Tags in the prompt count as adapters of the request, so axes vary these too. check: is given each cell's request
        before the next is made, and may raise. Raises UserError for an axis or a value that does not exist, when there
        are more than 400 cells, or when a prompt grows too long.
        """
        axes = [axis for axis in (self.z, self.y, self.x) if axis is not None]
        if len({axis.name for axis in axes}) < len(axes):
            raise UserError("Two axes vary the same setting. Give each axis another one.")
        count = 1
        for axis in axes:
            check_axis(axis)
            count *= len(axis.values)
        if count > MAX_CELLS:
            raise UserError(f"The sheet would have {count} pictures; at most {MAX_CELLS} are drawn. Use fewer values.")
        base = resolve_tags(self.request)
        cells: list[Cell] = []
        for z, y, x in itertools.product(
            *(range(len(axis.values) if axis else 1) for axis in (self.z, self.y, self.x))
        ):
            chosen = [(axis, axis.values[at]) for axis, at in ((self.x, x), (self.y, y), (self.z, z)) if axis]
            request = base
            for name in AXES:  # which adapters come before how strong they are, whatever axis each is on
                for axis, value in chosen:
                    if axis.name == name:
                        request = AXES[name](request, value, axis)
            check(request)
            cells.append(Cell(x, y, z, request))
        return cells

    def picture(self, images: Sequence[Image.Image | None]) -> Image.Image:
        """The labelled sheet. images: in the order of `cells`; None leaves a cell empty."""
        width, height = len(self.x.values), len(self.y.values) if self.y else 1
        size = width * height
        panels = [
            contact_sheet(
                [images[z * size + y * width : z * size + (y + 1) * width] for y in range(height)],
                row_labels=[self.y.label(value) for value in self.y.values] if self.y else (),
                column_labels=[self.x.label(value) for value in self.x.values],
                title=self.z.label(self.z.values[z]) if self.z else self.request.prompt,
            )
            for z in range(len(self.z.values) if self.z else 1)
        ]
        return stacked(panels)

    def parameters(self, model_name: str, hashes: dict[str, str]) -> str:
        """Text for the sheet's PNG: the request's parameters, and the axes under the names that A1111 gives them."""
        fields = {"Script": "X/Y/Z plot"}
        for letter, axis in (("X", self.x), ("Y", self.y), ("Z", self.z)):
            if axis:
                fields |= {f"{letter} Type": axis.name, f"{letter} Values": ", ".join(axis.values)}
        return add_fields(write_parameters(self.request, model_name, hashes), fields)


def draw_cells(
    engine: Engine, cells: Sequence[Cell], *, on_step: OnStep | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """(index in `cells`, picture) as they are done, those that can share a batch together.

    Raises UserError before anything is drawn if a cell is wrong.
    """
    requests = [engine.complete(cell.request) for cell in cells]
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(engine.batch_key(request), []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), engine.batch_size):
            batch = indices[start : start + engine.batch_size]
            yield from zip(batch, engine.generate([requests[i] for i in batch], on_step=on_step), strict=True)


def parse_axis(text: str, option: str) -> Axis:
    """`strength=0,0.5,1`, `prompt=red|blue`. option: what errors say it came from. Raises UserError."""
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not values.strip():
        raise UserError(f"{option} {text}: write the setting and its values, as in strength=0,0.5,1.")
    separator = "|" if name == "prompt" else ","
    axis = Axis(name, tuple(value.strip() for value in values.split(separator)))
    check_axis(axis)
    return axis


def check_axis(axis: Axis) -> None:
    """Raises UserError for a setting that is none and for values that are empty or twice the same."""
    if axis.name not in AXES:
        raise UserError(f"{axis.name!r} cannot be an axis. Possible: {', '.join(sorted(AXES))}.")
    if not axis.values or (not all(axis.values) and axis.name != "prompt"):
        raise UserError(f"The axis {axis.name} has an empty value. Take out the stray separator.")
    if len(set(axis.values)) < len(axis.values):
        raise UserError(f"The axis {axis.name} has a value twice: {', '.join(axis.values)}.")


def parse_set(text: str) -> dict[str, float]:
    """`ink+neon:0.5` → {"ink": 1, "neon": 0.5}; `none` → {}. A name that stands in it twice has its strengths added.

    Raises UserError for a strength that is no number.
    """
    if text == NONE:
        return {}
    adapters: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, strength = part.rpartition(":")
        name = name.strip() if colon else part.strip()
        adapters[name] = adapters.get(name, 0.0) + (_number(strength, "adapter") if colon else 1.0)
    return adapters


def _set_adapters(request: Request, value: str, _axis: Axis) -> Request:
    return replace(request, adapters=parse_set(value))


def _set_checkpoint(request: Request, value: str, _axis: Axis) -> Request:
    """In the place of the first adapter, at its strength: added to its own where it is another of them."""
    names = list(request.adapters)
    strength = request.adapters[names[0]] if names else 1.0
    others = {name: request.adapters[name] for name in names[1:]}
    if value == NONE:
        return replace(request, adapters=others)
    return replace(request, adapters={value: strength + others.pop(value, 0.0)} | others)


def _set_strength(request: Request, value: str, _axis: Axis) -> Request:
    """Of every adapter."""
    strength = _number(value, "strength")
    return replace(request, adapters=dict.fromkeys(request.adapters, strength))


def _replace_in_prompt(request: Request, value: str, axis: Axis) -> Request:
    term = axis.values[0]
    if not term or (term not in request.prompt and term not in request.negative):
        raise UserError(
            f"The prompt does not hold {term!r}. The first value of the axis prompt is what the others replace. "
            "It is not looked for in <lora:...> tags: vary these by the axes adapter and strength."
        )
    for text in (request.prompt, request.negative):
        length = len(text) + text.count(term) * (len(value) - len(term))
        if length > MAX_PROMPT_LENGTH:
            raise UserError(
                f"With {value[:40]!r} in the place of {term[:40]!r} the prompt has {length} characters; at most "
                f"{MAX_PROMPT_LENGTH} are read. Use shorter values, or a term that stands in it fewer times."
            )
    prompt, negative = (text.replace(term, value) for text in (request.prompt, request.negative))
    return resolve_tags(replace(request, prompt=prompt, negative=negative))


def _set_sampler(request: Request, value: str, _axis: Axis) -> Request:
    sampler_named(value)  # refuses what there is not
    return replace(request, sampler=value)


def _number(text: str, axis: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"The axis {axis} has the value {text!r}, which is no number.") from None


def _whole(text: str, axis: str) -> int:
    try:
        return int(text)  # a seed may have more digits than a float keeps
    except ValueError:
        pass
    value = _number(text, axis)
    if not value.is_integer():
        raise UserError(f"The axis {axis} has the value {format_number(value)}, which is no whole number.")
    return int(value)


AXES: dict[str, Callable[[Request, str, Axis], Request]] = {
    "adapter": _set_adapters,
    "checkpoint": _set_checkpoint,
    "prompt": _replace_in_prompt,
    "strength": _set_strength,
    "seed": lambda request, value, _: replace(request, seed=_whole(value, "seed")),
    "cfg": lambda request, value, _: replace(request, cfg=_number(value, "cfg")),
    "sampler": _set_sampler,
    "steps": lambda request, value, _: replace(request, steps=_whole(value, "steps")),
}
"""Settings that can be varied, in the order in which they are applied."""

_SPEAK_FOR_THEMSELVES = {"adapter", "checkpoint", "prompt", "sampler"}
