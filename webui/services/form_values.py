"""Between what stands in the fields of the form and what stands in a TOML file.

Reading a TOML file into the fields and writing them back gives an equal config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError, Problem
from lora_diffusion.config_file import MAX_BYTES, parse_toml
from webui.services.field_text import to_text, to_value, toml_value
from webui.services.schema import REPEATED, Setting, setting, settings

Fields = dict[str, str]
"""Full key (`run.steps`, `dataset.0.path`) → what stands in the field."""

MAX_TABLES = 100


def default_fields(num_tables: int = 1) -> Fields:
    """A fresh form."""
    fields: Fields = {}
    for section, rows in settings().items():
        prefixes = [f"{section}.{index}" for index in range(num_tables)] if section == REPEATED else [section]
        fields |= {f"{prefix}.{row.key}": row.default for prefix in prefixes for row in rows}
    return fields


def fields_from_toml(text: str, source: str = "config") -> tuple[Fields, tuple[Problem, ...]]:
    """The form for a TOML text, and what is wrong with the text. Keys that are not known are only in the problems.

    Raises ConfigError if it is not TOML at all.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(source, [Problem((), f"this is no config: it has more than {MAX_BYTES:,} characters")])
    data = parse_toml(text, source).data
    tables = data.get(REPEATED)
    tables = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    fields = default_fields(min(max(len(tables), 1), MAX_TABLES))
    given = [(section, section, data.get(section)) for section in settings() if section != REPEATED]
    given += [(REPEATED, f"{REPEATED}.{index}", table) for index, table in enumerate(tables[:MAX_TABLES])]
    for section, prefix, table in given:
        for key, value in table.items() if isinstance(table, dict) else ():
            if row := setting(section, key):
                fields[f"{prefix}.{key}"] = to_text(row.kind, value, is_optional=row.is_optional)
    return fields, problems_of(text, source)


def problems_of(text: str, source: str = "config") -> tuple[Problem, ...]:
    """What is wrong with a config, by key."""
    try:
        TrainConfig.parse(text, source)
    except ConfigError as error:
        return error.problems
    return ()


def toml_from_fields(fields: Mapping[str, str]) -> str:
    """The shortest file that says what the form says: what differs from the defaults, and what must be given."""
    blocks: list[str] = []
    for section, rows in settings().items():
        if section != REPEATED:
            lines = _lines(rows, section, fields)
            is_needed = any(row.is_required for row in rows)  # an empty table says which of its keys are missing
            blocks += [f"[{section}]\n{lines}"] if lines or is_needed else []
            continue
        for index in range(num_tables(fields)):
            blocks.append(f"[[{section}]]\n{_lines(rows, f'{section}.{index}', fields)}")
    return "\n".join(blocks)


def num_tables(fields: Mapping[str, str]) -> int:
    """How many data sets the form holds."""
    numbers = {int(parts[1]) for name in fields if (parts := name.split("."))[0] == REPEATED and len(parts) == 3}
    return min(len(numbers), MAX_TABLES)


def with_dataset(fields: Fields, path: str) -> Fields:
    """The form with that one data set; how its pictures are read stays as it was for the first one."""
    others = {name for name in fields if name.startswith(f"{REPEATED}.") and not name.startswith(f"{REPEATED}.0.")}
    return {name: value for name, value in fields.items() if name not in others} | {f"{REPEATED}.0.path": path}


def _lines(rows: tuple[Setting, ...], prefix: str, fields: Mapping[str, str]) -> str:
    lines: list[str] = []
    for row in rows:
        text = fields.get(f"{prefix}.{row.key}", row.default)
        if text == row.default and not (row.is_required and text):
            continue
        if not text and (row.is_optional or row.is_required):
            continue
        lines.append(f"{row.key} = {toml_value(to_value(row.kind, text, row.values))}\n")
    return "".join(lines)


def fields_from_json(text: str) -> tuple[Fields, dict[str, str]]:
    """What the browser sent: the fields that there are, and the texts beside them. Anything else is left out."""
    try:
        sent = json.loads(text) if text and len(text) <= 4 * MAX_BYTES else {}
    except (ValueError, RecursionError):
        sent = {}
    if not isinstance(sent, dict):
        return {}, {}
    values = sent.get("values")
    known = {
        name: value[:MAX_BYTES]
        for name, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, str) and _is_field(name)
    }
    tables = sorted({int(name.split(".")[1]) for name in known if name.startswith(f"{REPEATED}.")})
    number = {old: new for new, old in enumerate(tables[:MAX_TABLES])}
    fields: Fields = {}
    for name, value in known.items():
        section, _, rest = name.partition(".")
        if section == REPEATED:
            old, _, key = rest.partition(".")
            if int(old) in number:
                fields[f"{REPEATED}.{number[int(old)]}.{key}"] = value
        else:
            fields[name] = value
    return fields, {key: value for key, value in sent.items() if isinstance(value, str)}


def _is_field(name: str) -> bool:
    section, *rest = name.split(".")
    if section == REPEATED:
        return len(rest) == 2 and rest[0].isdecimal() and len(rest[0]) < 5 and setting(section, rest[1]) is not None
    return len(rest) == 1 and setting(section, rest[0]) is not None
