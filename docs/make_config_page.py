"""Writes docs/config.md from the fields of TrainConfig: `python docs/make_config_page.py`."""

from __future__ import annotations

from pathlib import Path
from typing import get_origin

from pydantic.fields import FieldInfo

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import describe_field, sections, shown

PAGE = Path(__file__).with_name("config.md")
INTRODUCTION = """# Config

<!-- Written by docs/make_config_page.py from lora_diffusion/config.py: change it there. -->

A run is described by one TOML file. Relative paths are relative to the working directory, and `~` is your home folder.
`--set section.key=value` overrides a key, for a data set `--set dataset.0.key=value`.
Unknown keys are errors. The run folder's `config.toml` holds all values, also those that were not given.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, section in sections(TrainConfig).items():
        is_list = get_origin(TrainConfig.model_fields[name].annotation) is tuple
        header = f"[[{name}]]" if is_list else f"[{name}]"
        rows = [_row(key, field) for key, field in section.model_fields.items()]
        summary = " ".join((section.__doc__ or "").split())
        parts.append(f"## `{header}`\n\n{summary}\n\n| Key | Default | Values | Meaning |\n| --- | --- | --- | --- |\n")
        parts[-1] += "\n".join(rows) + "\n"
    return "\n".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", _default(field), describe_field(field), " ".join((field.description or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default_factory is not None:
        return "not given"
    default = field.default
    if isinstance(default, tuple):
        default = list(default)
    return f"`{shown(default.as_posix() if isinstance(default, Path) else default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
