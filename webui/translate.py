"""The words of the UI. English and German have the same keys; a test holds them together.

What the settings of a training mean stands in `config.py`, in English; other languages have a file in `i18n/settings/`.
"""

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

    def setting(self, name: str, label: str, about: str) -> tuple[str, str]:
        """Label and description of a key or section of the config. label, about: in English, the config's own words."""
        return settings(self.language).get(name, (label, about))

    def href(self, path: str) -> str:
        """The address of a page in this language."""
        return f"{self.prefix}{path}"


@cache
def words(language: str) -> dict[str, str]:
    """Key → text."""
    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))


@cache
def settings(language: str) -> dict[str, tuple[str, str]]:
    """`run.steps` or `run` → label and description. Empty for English."""
    path = FOLDER / "settings" / f"{language}.json"
    if language == "en":
        return {}
    return {name: (label, about) for name, (label, about) in json.loads(path.read_text(encoding="utf-8")).items()}
