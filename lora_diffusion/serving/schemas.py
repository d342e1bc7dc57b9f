"""What clients may ask for, with the limits that hold on the server whatever a page allows."""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lora_diffusion.generation.request import Request, without_halves
from lora_diffusion.generation.sheet import Axis, Sheet

MAX_COUNT = 64
MAX_PROMPT_BYTES = 10_000
MAX_SIDE_PX = 2048
MAX_STEPS = 200
MAX_ADAPTERS = 32
MAX_STRENGTH = 100.0
MAX_SEED = 2**63 - 1 - MAX_COUNT

_RANDOM_SEEDS = 2**32  # short enough to be typed, as other programs draw them


def _check_prompt(text: str) -> str:
    if text != without_halves(text):
        raise ValueError("it holds half of a surrogate pair, which is no character; send it as UTF-8")
    size = len(text.encode("utf-8"))
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_PROMPT_BYTES} are read")
    return text


Prompt = Annotated[str, AfterValidator(_check_prompt)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
Strength = Annotated[FiniteFloat, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Name = Annotated[str, Field(min_length=1, max_length=255)]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Prompt
    """May hold `<lora:name:0.8>` tags and weights such as `(word:1.2)`."""
    negative: Prompt = ""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """None is a random one, which the answer names."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 25
    cfg: Annotated[FiniteFloat, Field(ge=1, le=100)] = 7.0
    size: tuple[Side, Side] | None = None
    """Width and height in px; None is the base's own."""
    sampler: Name = "ddim"
    clip_skip: Annotated[int, Field(ge=1, le=24)] = 1
    adapters: Annotated[dict[Name, Strength], Field(max_length=MAX_ADAPTERS)] = {}

    def request(self) -> Request:
        """The first picture; a seed of None is drawn here."""
        return Request(
            prompt=self.prompt,
            negative=self.negative,
            seed=secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed,
            steps=self.steps,
            cfg=self.cfg,
            size=self.size,
            sampler=self.sampler,
            clip_skip=self.clip_skip,
            adapters=dict(self.adapters),
        )


class ImageOrder(_Order):
    """`count` pictures that differ by their seeds: the given one and those after it."""

    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1


class AxisOrder(BaseModel):
    """An axis of a sheet. Checkpoints and adapters are named, as everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    axis: Literal["strength", "checkpoint", "seed", "cfg", "sampler", "steps", "adapter", "prompt"]
    values: Annotated[list[Annotated[str, Field(max_length=MAX_PROMPT_BYTES)]], Field(min_length=1, max_length=64)]

    def build(self) -> Axis:
        return Axis(self.axis, tuple(self.values))


class SheetOrder(_Order):
    """A request varied along one to three axes."""

    x: AxisOrder
    y: AxisOrder | None = None
    z: AxisOrder | None = None

    def sheet(self) -> Sheet:
        axes = [axis.build() if axis else None for axis in (self.x, self.y, self.z)]
        assert axes[0] is not None
        return Sheet(self.request(), axes[0], axes[1], axes[2])


def check_limits(request: Request) -> None:
    """For what tags and axes have made of an order. Raises RequestValidationError, as its fields do."""
    try:
        _Order.model_validate(vars(request))
    except ValidationError as error:
        raise RequestValidationError([{**it, "loc": ("body", *it["loc"])} for it in error.errors()]) from None
