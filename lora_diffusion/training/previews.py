"""Preview pictures while training, through the engine that `generate` uses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.grid import contact_sheet
from lora_diffusion.generation.infotext import save_png, write_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Previewer:
    """The same requests at every call, so that pictures differ only by what was learned. They are complete."""

    engine: Engine
    requests: Sequence[Request]
    folder: Path
    model_name: str

    def draw(self, step: int) -> list[Path]:
        """Write `000100-0.png` … for each prompt. The training model's random streams are not touched."""
        if not self.requests:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for index, image in enumerate(self.engine.generate(self.requests)):
            path = self.folder / f"{step:06d}-{index}.png"
            save_png(image, path, write_parameters(self.requests[index], self.model_name, {}))
            paths.append(path)
        return paths

    def draw_contact_sheet(self, path: Path) -> bool:
        """One picture of all previews: a row per prompt, a column per step. False when there are none."""
        steps = sorted({int(p.name.split("-")[0]) for p in self.folder.glob("??????-*.png")})
        if not steps or not self.requests:
            return False
        rows = [[self._open(step, index) for step in steps] for index in range(len(self.requests))]
        sheet = contact_sheet(
            rows,
            row_labels=[request.prompt for request in self.requests],
            column_labels=[f"step {step}" for step in steps],
        )
        sheet.save(path)
        return True

    def _open(self, step: int, index: int) -> Image.Image | None:
        path = self.folder / f"{step:06d}-{index}.png"
        return Image.open(path).convert("RGB") if path.exists() else None
