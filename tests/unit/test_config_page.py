"""The documentation of the config is that of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config_page", DOCS / "make_config_page.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_config_page_is_up_to_date() -> None:
    written = (DOCS / "config.md").read_text(encoding="utf-8")

    assert written == load_script().page(), "run: .venv/bin/python docs/make_config_page.py"


def test_every_key_has_a_sentence_on_the_config_page() -> None:
    rows = [line for line in load_script().page().splitlines() if line.startswith("| `")]

    assert len(rows) > 60
    assert all(len(row.split(" | ")[-1].strip(" |")) > 15 for row in rows)
