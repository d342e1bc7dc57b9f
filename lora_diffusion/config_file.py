"""Config files as text: reading TOML with its line numbers, `--set` overrides, and writing it back with comments."""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pydantic import BaseModel

from lora_diffusion.config_errors import (
    ConfigError,
    KeyPath,
    Problem,
    Tree,
    dotted,
    field_at,
    nearest,
    printable,
    value_at,
)

MAX_BYTES = 1_000_000
OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|\#[^\n]*", re.DOTALL
)
"""Strings and comments: the parts of a TOML file in which brackets and equals signs mean nothing."""


@dataclass
class Draft:
    """The content of a config file before it is checked, and where each key of it was given."""

    data: Tree
    text: str
    overrides: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])

    @cached_property
    def lines(self) -> dict[KeyPath, int]:
        """The line of each key; found only when there is a problem to tell."""
        return key_lines(self.text)

    def place(self, path: KeyPath) -> str:
        """Such as "line 12" or "--set run.steps=0"; the nearest table's where the key itself is not given."""
        for length in range(len(path), 0, -1):
            if override := self.overrides.get(path[:length]):
                return f"--set {printable(override)}"
            if line := self.lines.get(path[:length]):
                return f"line {line}"
        below = next((override for key, override in self.overrides.items() if key[: len(path)] == path), "")
        return f"--set {printable(below)}" if below and path else ""

    def placed(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems with their places, in the order of the file."""
        found = [Problem(problem.key, problem.message, self.place(problem.key)) for problem in problems]
        number = {problem.where: int(problem.where[5:]) for problem in found if problem.where.startswith("line ")}
        return sorted(found, key=lambda problem: number.get(problem.where, MAX_BYTES))


def read_text(path: Path) -> str:
    """The text of a config file. Raises ConfigError if it is not there, no text, or too large to be a config."""
    source = str(path)
    try:
        if path.is_dir():
            raise ConfigError(source, [Problem((), "this is a folder; expected a TOML file")])
        if not path.exists():
            raise ConfigError(source, [Problem((), "there is no such file" + _similar_file(path))])
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            size = path.stat().st_size / 1e6
            message = (
                f"this is no config file ({size:.1f} MB; a config is a TOML file of at most {MAX_BYTES // 10**6} MB)"
            )
            raise ConfigError(source, [Problem((), message)])
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(source, [Problem((), f"cannot be read: {error.strerror}")]) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8 text; save the file with the encoding UTF-8"
        raise ConfigError(source, [Problem((), message, f"line {line}")]) from None


def _similar_file(path: Path) -> str:
    others = {other.name: other for other in path.parent.glob("*.toml")} if path.parent.is_dir() else {}
    close = nearest(path.name, others)
    return f"; did you mean {others[close]}?" if close else ""


def parse_toml(text: str, source: str) -> Draft:
    """Raises ConfigError with the line where `text` is not TOML."""
    try:
        return Draft(tomllib.loads(text), text)
    except RecursionError:
        raise ConfigError(source, [Problem((), "not a config: brackets are nested too deeply")]) from None
    except ValueError as error:  # TOMLDecodeError, and int() refusing thousands of digits
        raise ConfigError(source, [_syntax_problem(str(error), text)]) from None


def _syntax_problem(error: str, text: str) -> Problem:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", error, re.DOTALL)
    message, line = (found[1], found[2] or str(text.rstrip().count("\n") + 1)) if found else (error, "")
    if message.startswith(("Cannot overwrite a value", "Cannot declare")):
        message = "this key or table is given twice; keep one"
    elif message.startswith("Invalid value"):
        message = 'a value is missing or not TOML; texts need quotes ("…"), and yes and no are true and false'
    return Problem((), f"not valid TOML: {message}", f"line {line}" if line else "")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line of each table and key of valid TOML text, counted from 1."""
    plain = OPAQUE.sub(lambda match: re.sub(r"[^\n]", " " if match[0][0] == "#" else "_", match[0]), text)
    lines: dict[KeyPath, int] = {}
    num_tables: Counter[str] = Counter()
    table: KeyPath = ()
    depth = 0  # of brackets: a key inside a value is no key of the file
    for number, line in enumerate(plain.split("\n"), 1):
        if depth == 0 and line.lstrip().startswith("["):
            name = line.strip().strip("[]")
            table = _parts(name)
            lines.setdefault(table, number)
            if line.lstrip().startswith("[["):
                table = (*table, num_tables[name])
                num_tables[name] += 1
                lines[table] = number
            continue
        key, equals, _ = line.partition("=")
        if depth == 0 and equals:
            path = (*table, *_parts(key))
            for length in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:length], number)
        depth += sum(line.count(bracket) for bracket in "[{") - sum(line.count(bracket) for bracket in "]}")
    return lines


def _parts(key: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in key.split("."))


def apply_overrides(
    draft: Draft,
    overrides: Sequence[str],
    model: type[BaseModel],
    instead_of: Mapping[KeyPath, KeyPath] = MappingProxyType({}),
) -> list[Problem]:
    """Write `section.key=value` texts into the draft; what cannot be written comes back as problems.

    instead_of: overriding the first key drops the second one, unless that is overridden too.
    """
    problems: list[Problem] = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in _parts(key))
        draft.overrides[path] = override
        if not equals or len(path) < 2 or "" in path:
            problems.append(Problem(path, "expected section.key=value, for example --set run.steps=200"))
        elif message := _write(draft.data, path, _override_value(raw.strip(), path, model)):
            problems.append(Problem(path, message))
    for chosen, other in instead_of.items():
        table = value_at(draft.data, other[:-1])
        if chosen in draft.overrides and other not in draft.overrides and isinstance(table, dict):
            cast("Tree", table).pop(str(other[-1]), None)
    return problems


def _override_value(raw: str, path: KeyPath, model: type[BaseModel]) -> object:
    """The value as TOML if it is TOML, else the text as it stands."""
    found = field_at(model, path)[1]
    if found and found.annotation in (str, Path) and raw[:1] not in ('"', "'"):
        return raw  # `run.name=2024` means the text
    try:
        values = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return values["value"] if list(values) == ["value"] else raw


def _write(data: Tree, path: KeyPath, value: object) -> str:
    """Set the value that `path` leads to; the reason if that is impossible."""
    container: Any = data
    for index, part in enumerate(path):
        is_last = index == len(path) - 1
        new = value if is_last else [] if isinstance(path[index + 1], int) else {}
        if isinstance(container, list) and isinstance(part, int):
            items = cast("list[object]", container)
            if part > len(items):
                return (
                    f"`{dotted(path[: index + 1])}` is too far: the next one is `{dotted((*path[:index], len(items)))}`"
                )
            items[part : part + 1] = [new] if is_last or part == len(items) else [items[part]]
        elif isinstance(container, dict) and isinstance(part, str):
            table = cast("Tree", container)
            table[part] = new if is_last else table.get(part, new)
        else:
            expected = "a number" if isinstance(container, list) else "no number"
            kind = {list: "a list", dict: "a table"}.get(type(cast("object", container)), "a value")
            return f"`{dotted(path[:index])}` is {kind}: {expected} can follow it, not `{part}`"
        container = cast("Any", container)[part]
    return ""


def to_toml(config: BaseModel) -> str:
    """All values of a config, each below its description; keys without a value stay out."""
    blocks: list[str] = []
    for name in type(config).model_fields:
        value: BaseModel | tuple[BaseModel, ...] = getattr(config, name)
        if isinstance(value, tuple):
            blocks += [f"# {_summary(table)}\n[[{name}]]\n{_table(table)}" for table in value]
        else:
            blocks.append(f"# {_summary(value)}\n[{name}]\n{_table(value)}")
    return "\n".join(blocks)


def _summary(table: BaseModel) -> str:
    return (type(table).__doc__ or "").strip()


def _table(table: BaseModel) -> str:
    lines: list[str] = []
    for key, field_info in type(table).model_fields.items():
        setting = getattr(table, key)
        if setting is not None:
            lines += textwrap.wrap(field_info.description or "", 116, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{key} = {_value(setting)}\n")
    return "\n".join(lines)


def _value(setting: object) -> str:
    import tomlkit  # only for writing: reading a config should not wait for it

    if not isinstance(setting, dict):
        return tomlkit.item(cast("Any", _plain(setting))).as_string()
    table = tomlkit.inline_table()
    table.update(cast("Tree", setting))
    return table.as_string()


def _plain(setting: object) -> object:
    if isinstance(setting, tuple):
        return [_plain(item) for item in cast("tuple[object, ...]", setting)]
    return setting.as_posix() if isinstance(setting, Path) else setting
