"""Starting points: the configs that ship with the project."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import lora_diffusion
from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError
from webui.services.form_values import Fields, fields_from_toml

CONFIGS = Path(lora_diffusion.__file__).resolve().parents[1] / "configs"
FIRST = "quickstart"

PLAIN = """# A style for Stable Diffusion 1.5. Set your pictures, the base and a name.
[run]
name = "my-style"
steps = 1500
[model]
path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
[[dataset]]
path = "data/my-style"
[schedule]
warmup_steps = 75
"""
"""Where the package was installed without the checkout's configs."""

_OWN = re.compile(r"run\.(name|output)|model\.path|dataset\.\d+\.(path|caption_prefix)|preview\.prompts")
"""What belongs to the user's subject and stays when another preset is chosen."""


@dataclass(frozen=True)
class Preset:
    """facts: short texts that tell presets apart, such as "rank 16"."""

    id: str
    title: str
    description: str
    facts: tuple[str, ...]
    toml: str

    @property
    def fields(self) -> Fields:
        """Without the run folder, which follows from the name that the user will give."""
        return fields_from_toml(self.toml, self.id)[0] | {"run.output": ""}


def presets(folder: Path = CONFIGS) -> dict[str, Preset]:
    """By id. The one for a first try comes first."""
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("*.toml"), key=lambda path: (path.stem != FIRST, path.stem)):
        try:
            texts[path.stem] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
    found = {id: preset for id, text in (texts or {"style": PLAIN}).items() if (preset := _preset(id, text))}
    return found or {"style": _preset("style", PLAIN)}  # pyright: ignore[reportReturnType]


def apply(preset: Fields, fields: Fields, before: Fields) -> Fields:
    """The preset's settings with the subject that the user has set. before: what the form was filled with earlier."""
    own = {name: text for name, text in fields.items() if _OWN.fullmatch(name) and text != before.get(name, "")}
    return preset | own


def _preset(id: str, text: str) -> Preset | None:
    try:
        config = TrainConfig.parse(text, id)
    except ConfigError:
        return None
    side = config.dataset[0].resolution
    facts = (
        f"{config.adapter.kind} · rank {config.adapter.rank}",
        f"{config.run.steps} steps" if config.run.steps else f"{config.run.epochs} epochs",
        f"{side if isinstance(side, int) else f'{side[0]} × {side[1]}'} px",
    )
    return Preset(id, _title(id), _description(text), facts, text)


def _title(id: str) -> str:
    words = id.replace("_", "-").split("-")
    known = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL", "lokr": "LoKr", "dora": "DoRA", "v": "v-prediction"}
    known |= {"lowvram": "low memory", "pred": "prediction"}
    title = " ".join(known.get(word, word) for word in words)
    return title[0].upper() + title[1:]


def _description(text: str) -> str:
    """The first sentences of the comment at the top."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    sentences = re.split(r"(?<=[.!])\s+", " ".join(lines))
    chosen = ""
    for sentence in sentences:
        if chosen and len(chosen) + len(sentence) > 150:
            break
        chosen = f"{chosen} {sentence}".strip()
    return chosen.replace("`", "")
