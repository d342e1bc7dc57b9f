"""Every setting of a run as the form needs it: read from `TrainConfig`, so that nothing is said twice."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import describe_field, sections
from webui.services.field_text import Kind, to_text

REPEATED = "dataset"
"""The one table that may be given several times."""


@dataclass(frozen=True)
class Setting:
    """One key of the config file.

    default: as the form shows it; "" where nothing given has a meaning of its own (`is_optional`).
    values: the allowed values of a choice, as texts.
    """

    section: str
    key: str
    kind: Kind
    default: str
    description: str
    range: str
    values: tuple[str, ...] = ()
    is_required: bool = False
    is_optional: bool = False

    @property
    def name(self) -> str:
        """`run.steps`, as `--set` calls it; for a repeated table without the number."""
        return f"{self.section}.{self.key}"


@cache
def settings() -> dict[str, tuple[Setting, ...]]:
    """Section → its settings, both in the order of the config."""
    return {
        name: tuple(_setting(name, key, field) for key, field in section.model_fields.items())
        for name, section in sections(TrainConfig).items()
    }


def summary(section: str) -> str:
    """What a table is about, in one sentence."""
    return (sections(TrainConfig)[section].__doc__ or "").strip()


def setting(section: str, key: str) -> Setting | None:
    return next((found for found in settings().get(section, ()) if found.key == key), None)


def _setting(section: str, key: str, field: FieldInfo) -> Setting:
    kind, values = _kind(field.annotation)
    has_own_default = field.default is not PydanticUndefined and field.default is not None
    return Setting(
        section,
        key,
        kind,
        default=to_text(kind, _as_toml(field.default)) if has_own_default else "",
        description=" ".join((field.description or "").split()),
        range=describe_field(field),
        values=values,
        is_required=field.is_required(),
        is_optional=not field.is_required() and not has_own_default,
    )


def _as_toml(value: Any) -> Any:
    """A default as `tomllib` would have read it."""
    if isinstance(value, tuple):
        return [_as_toml(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    members = list(_members(annotation))
    literals = tuple(str(value) for member in members if get_origin(member) is Literal for value in get_args(member))
    others = [member for member in members if get_origin(member) is not Literal]
    if bool in others:
        return ("choice", (*literals, "true", "false")) if literals else ("switch", ())
    if any(get_origin(member) is dict for member in others):
        return "pairs", ()
    tuples = [get_args(member) for member in others if get_origin(member) is tuple]
    if literals and any(arguments[-1] is ... for arguments in tuples):
        return "choice-or-list", literals
    if any(arguments[-1] is ... for arguments in tuples):
        return "list", ()
    if tuples:
        return ("size", ()) if _plain(tuples[0][0]) is int else ("numbers", ())
    if literals and not others:
        return "choice", literals
    if Path in others:
        return "path", ()
    return ("number", literals) if int in others or float in others else ("text", ())


def _members(annotation: Any) -> list[Any]:
    """The types that a union is made of, without their constraints and without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) else [annotation]


def _plain(annotation: Any) -> Any:
    return _members(annotation)[0]
