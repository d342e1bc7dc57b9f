"""The words of the UI. English and German have the same keys; a test holds them together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "de": "Deutsch"}
FOLDER = Path(__file__).parent / "i18n"


@dataclass(frozen=True)
class Translator:
    """`t("runs.title")` in one language. `prefix` starts the addresses of its pages."""

    language: str

    @property
    def prefix(self) -> str:
        return "" if self.language == "en" else f"/{self.language}"

    def __call__(self, key: str, **values: object) -> str:
        """The text of `key` with `{names}` filled in. Raises KeyError for a key that there is not."""
        text = words(self.language)[key]
        return text.format(**values) if values else text

    def href(self, path: str) -> str:
        """The address of a page in this language."""
        return f"{self.prefix}{path}"


@cache
def words(language: str) -> dict[str, str]:
    """Key → text."""
    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
