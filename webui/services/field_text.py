"""A TOML value as a person types it into a field, and back.

What is not a value of its kind stays the text it is, so that the config's own check can say what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

import tomlkit

Kind = Literal["switch", "choice", "choice-or-list", "number", "text", "path", "list", "pairs", "size", "numbers"]

_SIZE = re.compile(r"\s*(\d{1,9})\s*[x×*,]\s*(\d{1,9})\s*")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def to_text(kind: Kind, value: Any, *, is_optional: bool = False) -> str:
    """A TOML value as the form shows it."""
    match kind, value:
        case _, bool():
            return "true" if value else "false"
        case "list" | "choice-or-list", list():
            return "\n".join(_quoted_if_needed(item, one_line=True) for item in value)
        case "pairs", dict():
            return "\n".join(f"{_quoted_if_needed(key, pair=True)} = {_number(item)}" for key, item in value.items())
        case "size", [width, height]:
            return f"{_number(width)} × {_number(height)}"
        case "numbers", list():
            return ", ".join(_number(item) for item in value)
        case _, str():
            return _quoted_if_needed(value, keep_empty=is_optional)
    return _number(value)


def to_value(kind: Kind, text: str, values: Sequence[str] = ()) -> Any:
    """What a field's text means in TOML; the text itself where it has no meaning of that kind."""
    match kind:
        case "switch":
            return {"true": True, "false": False}.get(text, text)
        case "choice":
            is_flag = "true" in values and text in ("true", "false")
            return text == "true" if is_flag else _literal(values, text)
        case "list":
            return [_unquoted(line.strip()) for line in text.splitlines() if line.strip()]
        case "choice-or-list":
            lines = [_unquoted(line.strip()) for line in text.splitlines() if line.strip()]
            return lines[0] if len(lines) == 1 and lines[0] in values else lines
        case "pairs":
            return _pairs(text)
        case "size":
            found = _SIZE.fullmatch(text)
            return [int(found[1]), int(found[2])] if found else _parsed(text)
        case "numbers":
            return [_parsed(part) for part in text.split(",")]
        case "number":
            return text if text in values else _parsed(text)
        case "path":
            return _unquoted(text.strip())
        case "text":
            return _unquoted(text)


def _pairs(text: str) -> Any:
    pairs: dict[str, Any] = {}
    for line in text.splitlines():
        key, equals, number = line.rpartition("=")
        if line.strip() and not equals:
            return text
        if line.strip():
            pairs[_unquoted(key.strip())] = _parsed(number)
    return pairs


def _literal(values: Sequence[str], text: str) -> Any:
    """`max_tokens` offers whole numbers: a choice may be a number in TOML."""
    return int(text) if text in values and text.isdecimal() else text


def _parsed(text: str) -> Any:
    """A number, or the text as it stands."""
    text = text.strip()
    if not re.fullmatch(r"[+-]?[\d_]{1,40}(\.[\d_]{1,40})?([eE][+-]?\d{1,4})?", text):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # 007
        return text


def _number(value: Any) -> str:
    """A number as people write it: 1e-4 for 0.0001."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    if abs(value) >= 1e-3:
        return str(value)
    mantissa, _, exponent = f"{Decimal(repr(value)).normalize():e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _quoted_if_needed(value: Any, *, one_line: bool = False, pair: bool = False, keep_empty: bool = False) -> str:
    if not isinstance(value, str):
        return str(value)
    needs = value[:1] == '"' or any(c in value for c in _LINE_ENDS)
    needs |= (one_line or pair) and value != value.strip()
    needs |= value == "" and (keep_empty or one_line or pair)
    return json.dumps(value, ensure_ascii=True) if needs else value


def _unquoted(text: str) -> str:
    """A text in double quotes is read as JSON: that is how line breaks and empty texts are given."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text


def toml_value(value: Any) -> str:
    """As a TOML file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list):
        return _toml_list(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_string(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    return _toml_string(value) if isinstance(value, str) else str(value)


def _toml_list(values: list[Any]) -> str:
    items = [toml_value(item) for item in values]
    if len(items) > 1 and all(isinstance(item, str) for item in values):
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return "[" + ", ".join(items) + "]"


def _toml_string(text: str) -> str:
    return tomlkit.item(text).as_string()
