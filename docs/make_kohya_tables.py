"""Writes the tables of docs/from-sd-scripts.md from what `import` does: `python docs/make_kohya_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from lora_diffusion.kohya.gui import GUI_ROWS
from lora_diffusion.kohya.keys import TRANSLATED, WITHOUT_EFFECT, WITHOUT_EQUAL, as_table

PAGE = Path(__file__).with_name("from-sd-scripts.md")
TABLES = {
    "translated": as_table(TRANSLATED),
    "kohya_ss": as_table(GUI_ROWS, "kohya_ss"),
    "without effect": as_table(WITHOUT_EFFECT),
    "without equal": as_table(WITHOUT_EQUAL),
}
PLACE = re.compile(r"(<!-- table (.+?):.*? -->\n\n)(?:\|.*\n)*")


def page(text: str) -> str:
    """The page with its tables as they should be."""
    return PLACE.sub(lambda match: match[1] + TABLES[match[2]], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
