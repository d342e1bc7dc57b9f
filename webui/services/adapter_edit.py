"""Changes to the library: metadata, copies, deleting. The tensors of a file stay bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.container import read_header, with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.workspace import Workspace
from webui.services.library import Adapter

MAX_TEXT = 8000
MAX_FILE_BYTES = 4_000_000_000
NUM_TEXTS = 4
"""Title, trigger words, tags and description, in this order."""


@dataclass(frozen=True)
class Description:
    """What can be edited, as ModelSpec names it. thumbnail: a data URI, "" for none, None to leave it as it is."""

    title: str
    trigger_phrase: str
    tags: str
    description: str
    thumbnail: str | None = None


def texts_of(adapter: Adapter) -> list[str]:
    """What the file says of itself: `NUM_TEXTS`, empty if it cannot be read."""
    if adapter.facts.error:
        return [""] * NUM_TEXTS
    given = read_header(adapter.path).metadata
    facts = adapter.facts
    return [given.get("modelspec.title", ""), facts.trigger, given.get("modelspec.tags", ""), facts.description]


def note_of(adapter: Adapter, texts: Sequence[str]) -> str:
    """Of which adapter fields were filled with which texts, for `typed_over`."""
    return json.dumps([adapter.id, *texts], ensure_ascii=False)


def is_about(note: str, id: str) -> bool:
    """Whether the fields were filled with the texts of the adapter `id`."""
    return _noted(note)[0] == id


def typed_over(adapter: Adapter, texts: Sequence[str], fields: Sequence[object], note: str) -> list[str]:
    """`texts` of the file as it is now, with what a person made of others in `fields` since these were filled."""
    id, *before = _noted(note)
    if id != adapter.id:
        return list(texts)
    return [
        field if isinstance(field, str) and field != old else text
        for text, field, old in zip(texts, fields, before, strict=True)
    ]


def _noted(note: str) -> list[str]:
    """The id and the texts of `note_of`; all empty if it is none."""
    try:
        values = json.loads(note)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list) and len(values) == 1 + NUM_TEXTS and all(isinstance(value, str) for value in values):
        return values
    return [""] * (1 + NUM_TEXTS)


def edit(adapter: Adapter, wanted: Description) -> None:
    """Write the description into the file, whole or not at all. Raises UserError for a file that is not ours."""
    if adapter.source == "sample":
        raise UserError("This file ships with the program. Copy it to the library and edit the copy.")
    if adapter.size > MAX_FILE_BYTES:
        raise UserError("The file is too large to be edited.")
    metadata = dict(read_header(adapter.path).metadata)
    write_bytes_atomically(adapter.path, with_metadata(adapter.path.read_bytes(), changed_metadata(metadata, wanted)))


def changed_metadata(metadata: Mapping[str, str], wanted: Description) -> dict[str, str]:
    """The metadata with the description's fields; an empty one goes."""
    changed = dict(metadata)
    values: dict[str, str | None] = {
        "title": wanted.title,
        "trigger_phrase": wanted.trigger_phrase,
        "tags": ", ".join(tag.strip() for tag in wanted.tags.split(",") if tag.strip()),
        "description": wanted.description,
        "thumbnail": wanted.thumbnail,
    }
    for key, value in values.items():
        if value is None:
            continue
        if len(value) > MAX_TEXT and key != "thumbnail":
            raise UserError(f"{key} has {len(value)} characters; at most {MAX_TEXT} are written.")
        if value.strip():
            changed[f"modelspec.{key}"] = value.strip()
        else:
            changed.pop(f"modelspec.{key}", None)
    return changed


def copy_to_library(workspace: Workspace, adapter: Adapter, name: str | None = None) -> Path:
    """A copy in adapters/ under a free name, with nothing half copied left behind."""
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    target = _take_name(workspace.adapters / f"{name or adapter.path.stem}.safetensors")
    try:
        write_bytes_atomically(target, adapter.path.read_bytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


def _take_name(path: Path) -> Path:
    """An empty file of that name, or with a number where there is one: nobody else can take the name meanwhile."""
    free, number = path, 2
    while True:
        try:
            free.touch(exist_ok=False)
            return free
        except FileExistsError:
            free, number = path.with_name(f"{path.stem} {number}{path.suffix}"), number + 1
