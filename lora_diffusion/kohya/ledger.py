"""Settings read with their types, and an account of what became of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from lora_diffusion.config_errors import KeyPath, Problem, Tree, nearest, shown
from lora_diffusion.kohya.gui import is_nothing
from lora_diffusion.kohya.keys import NEEDS, OFF_VALUES, TRANSLATED, WITHOUT_EFFECT, WITHOUT_EQUAL, by_name, spoken
from lora_diffusion.kohya.read import Source

_TRANSLATED, _WITHOUT_EFFECT, _WITHOUT_EQUAL = by_name(TRANSLATED), by_name(WITHOUT_EFFECT), by_name(WITHOUT_EQUAL)
_SECRET = re.compile(r"token$|api_key|password|secret", re.IGNORECASE)
_YES = ("true", "1", "yes", "on")


@dataclass
class Ledger:
    """Reads a source's settings and keeps what is made of them.

    values: ours, as TOML has them. comments: by key, where a value comes from. The accounts are by the name that the
    source's file uses; without_equal and differences are sentences for the user.
    """

    source: Source
    values: Tree = field(default_factory=dict[str, object])
    comments: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])
    origins: dict[KeyPath, tuple[str, ...]] = field(default_factory=dict[KeyPath, tuple[str, ...]])
    translated: dict[str, str] = field(default_factory=dict[str, str])
    without_effect: dict[str, str] = field(default_factory=dict[str, str])
    without_equal: dict[str, str] = field(default_factory=dict[str, str])
    unknown: dict[str, str] = field(default_factory=dict[str, str])
    off: list[str] = field(default_factory=list[str])
    differences: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])

    # --- reading: names are those of sd-scripts; the default stands for what is not given -----------------------------

    def origin(self, name: str) -> str:
        """How the file calls a setting."""
        setting = self.source.settings.get(name)
        return spoken(setting.origin if setting else name)

    def value(self, name: str) -> object:
        """The value as it stands; None where it is not given or empty."""
        setting = self.source.settings.get(name)
        return None if setting is None or setting.value in ("", []) else setting.value

    def is_on(self, name: str) -> bool:
        """Whether a setting is given and not off."""
        value = self.value(name)
        return not is_nothing(value) and not _is_one_of(value, OFF_VALUES.get(_bare(name), ()))

    def switch(self, name: str) -> bool:
        value = self.value(name)
        if isinstance(value, str) and value.lower() not in _YES and not is_nothing(value):
            self.wrong(name, "true or false")
        return not is_nothing(value) and (not isinstance(value, str) or value.lower() in _YES)

    def text(self, name: str) -> str:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, "text")
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> float | None:
        """A number, also written as text."""
        value = self.value(name)
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        try:
            number = float(cast("str", value)) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.wrong(name, "a number")
            return None
        return number

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        if number is None:
            return None
        if number != int(number):
            self.wrong(name, "a whole number")
        return int(number)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers, also one number, or text with commas or spaces between them."""
        value = self.value(name)
        items = cast("list[object]", value) if isinstance(value, list) else _split(str(value)) if value else []
        items = [value] if isinstance(value, (int, float)) else items
        try:
            numbers = [float(cast("str", item)) for item in items]
        except (TypeError, ValueError, OverflowError):
            numbers = [math.nan]
        if not all(math.isfinite(number) for number in numbers):
            self.wrong(name, "numbers")
            return []
        return numbers

    def wrong(self, name: str, expected: str) -> None:
        """Note a value that is not of its kind."""
        message = f"`{self.origin(name)}` is {shown(self.value(name))}; expected {expected}. Correct it in this file"
        if all(problem.message != message for problem in self.problems):
            self.problems.append(Problem((), message))

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, key: str, value: object, *names: str, note: str = "") -> None:
        """Set one of our keys (`dataset.0.path`) from these settings of theirs, or, as `note` tells, from none."""
        path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        table: Tree = self.values
        if path[0] == "dataset":
            tables: list[Tree] = self.values.setdefault("dataset", [])
            while len(tables) <= int(path[1]):
                tables.append({})
            table = tables[int(path[1])]
        else:
            table = self.values.setdefault(str(path[0]), {})
        table[str(path[-1])] = value
        given = [name for name in names if name in self.source.settings]
        self.origins[path] = tuple(dict.fromkeys(self.origin(name) for name in given))
        spoken_names = ", ".join(self.origins[path])
        self.comments[path] = f"{spoken_names}: {note}" if spoken_names and note else spoken_names or note
        for name in given:
            self.translated.setdefault(self.origin(name), key)

    def refuse(self, name: str, advice: str) -> None:
        """This value of a setting has no equal."""
        self.without_equal[self.origin(name)] = f"{self._shown(name)}: {advice}"

    def ignore(self, name: str, reason: str) -> None:
        """This setting changes nothing here."""
        if name in self.source.settings:
            self.without_effect[self.origin(name)] = reason

    def differ(self, text: str) -> None:
        """Something that is done in another way, whatever the settings."""
        if text not in self.differences:
            self.differences.append(text)

    # --- the account --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Find a place in the account for every setting that nothing was made of."""
        for origin, reason in self.source.without_effect.items():
            self._settle(origin, reason)
        for name in self.source.settings:
            origin, bare = self.origin(name), _bare(name)
            if origin in self.translated or origin in self.without_equal or origin in self.without_effect:
                continue
            if not self.is_on(name) or not self._is_needed(bare):
                self.off.append(origin)
            elif bare in _WITHOUT_EFFECT:
                self.without_effect[origin] = _WITHOUT_EFFECT[bare].note
            elif bare in _WITHOUT_EQUAL:
                self.refuse(name, _WITHOUT_EQUAL[bare].note)
            elif bare in _TRANSLATED:
                needed = NEEDS.get(bare, "")
                lacks = self.origin(needed) in self.without_equal
                self.without_effect[origin] = f"belongs to `{needed}`" if lacks else "another setting takes its place"
            else:
                self.unknown[origin] = self._shown(name) + self._suggestion(bare)

    def _settle(self, origin: str, reason: str) -> None:
        if reason:
            self.without_effect[spoken(origin)] = reason
        elif origin not in self.translated:
            self.off.append(spoken(origin))

    def _shown(self, name: str) -> str:
        """A value for the report, unless it may be a secret."""
        return "…" if _SECRET.search(name) else shown(self.value(name))

    def _is_needed(self, bare: str) -> bool:
        needed = NEEDS.get(bare)
        return needed is None or any(_bare(name) == needed and self.is_on(name) for name in self.source.settings)

    def _suggestion(self, bare: str) -> str:
        close = nearest(bare, [*_TRANSLATED, *_WITHOUT_EFFECT, *_WITHOUT_EQUAL])
        return f"; did you mean `{spoken(close)}`?" if close else ""


def _bare(name: str) -> str:
    """The name of a setting without the table of a dataset config."""
    return name.rpartition(".")[2] if name.startswith(("general.", "datasets.")) else name


def _split(text: str) -> Sequence[str]:
    return text.strip("()[] ").replace(",", " ").split()


def _is_one_of(value: object, off: Iterable[object]) -> bool:
    try:
        return any(value == item or float(cast("str", value)) == item for item in off)
    except (TypeError, ValueError, OverflowError):
        return value in off
