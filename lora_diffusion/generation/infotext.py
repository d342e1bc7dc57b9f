"""The `parameters` text of a PNG, in the form that A1111 writes and most programs read.

prompt <lora:ink:0.8>
Negative prompt: blurry
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15, …
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.generation.request import Request, format_number, resolve_tags, write_tags
from lora_diffusion.generation.samplers import SAMPLERS

NEGATIVE = "Negative prompt:"
SHORT_HASH = 12  # hex digits of an adapter's hash in "Lora hashes", as A1111 and Forge show them

_FIELD = re.compile(r'\s*(?P<key>[\w][\w \-/]*): *(?P<value>"(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_FIELDS_LINE = re.compile(r"Steps: *\d+ *(,|$)")
_PLAIN_SCHEDULES = ("", "Automatic", "Uniform")  # the sampler's own steps, in A1111's words
_KARRAS_UNLESS_SAID = ("DPM++ 2M",)  # A1111 since 1.9 and Forge: with no schedule type, or "Automatic"


class ParametersError(UserError):
    """A picture's parameters cannot be read."""


@dataclass(frozen=True)
class Parameters:
    """What a picture's text says: the request, with adapters in its map, and what names the files behind it."""

    request: Request
    model: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Adapter name → hex digits that the text gives, often the first 12."""


def write_parameters(request: Request, model_name: str, hashes: Mapping[str, str]) -> str:
    """The text that `read_parameters` turns back into the same request, its tags resolved.

    hashes: adapter name → hex digest, of which the first 12 digits are written; adapters that are not in the request
    are left out. A request without a size writes none: give `Engine.complete(request)` to have it.
    """
    request = resolve_tags(request)
    prompt = " ".join(text for text in (request.prompt, write_tags(request.adapters)) if text)
    lines = [prompt]
    if request.negative:
        lines.append(f"{NEGATIVE} {request.negative}")
    fields = _fields(request, model_name, hashes)
    if f"\n{NEGATIVE}" in f"\n{prompt}":
        fields["Prompt lines"] = str(prompt.count("\n") + 1)  # ours; only where the usual form would be ambiguous
    lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def add_fields(text: str, fields: Mapping[str, str]) -> str:
    """The text of `write_parameters` with more fields at its end; readers pass over those they do not know."""
    return ", ".join([text, *(f"{key}: {_quote(value)}" for key, value in fields.items())])


def read_parameters(text: str) -> Parameters:
    """Reads what `write_parameters` or A1111 wrote; fields that a request has no place for are passed over.

    A sampler that we do not have keeps its foreign name, so that drawing the request says which one is missing.
    Raises ParametersError when a number is not one.
    """
    body, fields = _split_fields(text)
    prompt, negative = _split_prompts(body, fields)
    try:
        request = Request(
            prompt=prompt,
            negative=negative,
            seed=int(fields.get("Seed", Request.seed)),
            steps=int(fields.get("Steps", Request.steps)),
            cfg=float(fields.get("CFG scale", Request.cfg)),
            size=_size(fields["Size"]) if "Size" in fields else None,
            sampler=_sampler_key(fields["Sampler"], fields.get("Schedule type", "")) if "Sampler" in fields else "ddim",
            clip_skip=int(fields.get("Clip skip", Request.clip_skip)),
        )
    except ValueError as error:
        raise ParametersError(f"The picture's parameters hold a value that is not a number: {error}.") from None
    return Parameters(resolve_tags(request), fields.get("Model", ""), _read_hashes(fields.get("Lora hashes", "")))


def png_bytes(image: Image.Image, text: str) -> bytes:
    """A PNG with `text` as its `parameters`."""
    info = PngInfo()
    info.add_text("parameters", text)  # Latin-1 as tEXt, anything else as iTXt
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(image: Image.Image, path: Path, text: str, *, is_new: bool = False) -> None:
    """Write a PNG with `text` as its `parameters`, whole or not at all. is_new: see `replacement_of`."""
    write_bytes_atomically(path, png_bytes(image, text), is_new=is_new)


def read_png(path: Path) -> Parameters:
    """The parameters in a PNG. Raises ParametersError when it is no picture, too large a one or carries none."""
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ParametersError(f"{path}: cannot be read as a picture ({error}).") from None
    if not isinstance(text, str):
        raise ParametersError(
            f"{path}: carries no generation parameters. They are lost when a picture is edited, converted or sent "
            "through a chat program; use the file as it was written."
        )
    return read_parameters(text)


def _fields(request: Request, model_name: str, hashes: Mapping[str, str]) -> dict[str, str]:
    sampler = SAMPLERS.get(request.sampler)
    fields = {"Steps": str(request.steps), "Sampler": sampler.label if sampler else request.sampler}
    if sampler and (sampler.schedule_type or sampler.label in _KARRAS_UNLESS_SAID):
        fields["Schedule type"] = sampler.schedule_type or "Uniform"
    fields |= {"CFG scale": format_number(request.cfg), "Seed": str(request.seed)}
    if request.size:
        fields["Size"] = f"{request.size[0]}x{request.size[1]}"
    if model_name:
        fields["Model"] = model_name
    if request.clip_skip != 1:
        fields["Clip skip"] = str(request.clip_skip)
    used = [f"{name}: {hashes[name][:SHORT_HASH]}" for name in request.adapters if name in hashes]
    if used:
        fields["Lora hashes"] = ", ".join(used)
    return fields | {"Version": "lora-diffusion"}


def _split_fields(text: str) -> tuple[str, dict[str, str]]:
    """Everything before the last line, and the last line's fields; no fields when it is not such a line."""
    body, _, last = text.rstrip("\n").rpartition("\n")
    if not _FIELDS_LINE.match(last):
        return text, {}
    return body, {match["key"]: _unquote(match["value"].strip()) for match in _FIELD.finditer(last)}


def _split_prompts(body: str, fields: Mapping[str, str]) -> tuple[str, str]:
    lines = body.split("\n")
    if fields.get("Prompt lines", "").isdecimal():
        num_prompt_lines = int(fields["Prompt lines"])
    else:
        starts = (index for index, line in enumerate(lines) if line.startswith(NEGATIVE))
        num_prompt_lines = next(starts, len(lines))
    negative = "\n".join(lines[num_prompt_lines:]).removeprefix(NEGATIVE).removeprefix(" ")
    return "\n".join(lines[:num_prompt_lines]), negative


def _sampler_key(label: str, schedule_type: str) -> str:
    """Our key for A1111's words, which older versions wrote as one: "DPM++ 2M Karras"."""
    full = label if schedule_type in _PLAIN_SCHEDULES else f"{label} {schedule_type}"
    named = {f"{sampler.label} {sampler.schedule_type}".strip(): key for key, sampler in SAMPLERS.items()}
    return named.get(full, full)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _read_hashes(text: str) -> dict[str, str]:
    pairs = (part.rpartition(":") for part in text.split(","))
    return {name.strip(): digits.strip() for name, _, digits in pairs if name.strip()}


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value
