"""Preview pictures while training, through the engine that `generate` uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Cancelled, Engine, Request
from lora_diffusion.generation.grid import contact_sheet, open_reduced, save_sheet
from lora_diffusion.generation.infotext import save_png, write_parameters

logger = logging.getLogger(__name__)

MAX_PROMPTS, MAX_PROMPT_LENGTH = 16, 5000  # of one request; the training waits for its pictures
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Previewer:
    """The same requests at every call, so that pictures differ only by what was learned. They are complete.

    template: what the requests have in common; pictures that are asked for later differ from it by what they say.
    """

    engine: Engine
    requests: Sequence[Request]
    template: Request
    folder: Path
    model_name: str

    def draw_in_training(self, step: int, asked: Mapping[str, Any] | None, on_step: OnStep) -> None:
        """Its own requests, or what `asked` says. A failed picture must not cost the training, a stop ends it."""
        try:
            if asked:
                self.draw_asked(step, asked, on_step)
            else:
                self.draw(step, on_step)
        except Cancelled:
            logger.info("step %d: the preview is left out, as the run is to stop", step)
        except Exception as error:  # whatever it is, the next step does not need the picture
            told = str(error) or type(error).__name__
            logger.warning("step %d: the preview could not be drawn (%s); training goes on", step, told)

    def draw(self, step: int, on_step: OnStep | None = None) -> list[Path]:
        """Write `000100-0.png` … for each prompt. The training model's random streams are not touched."""
        return self._write(self.requests, f"{step:06d}", on_step)

    def draw_asked(self, step: int, content: Mapping[str, Any], on_step: OnStep | None = None) -> list[Path]:
        """Write `now-000100-0.png` … for `{"prompts": […], "seed": 7, "steps": 25, "cfg": 7.0}`.

        Only prompts must be there; further ones count the seed up. Raises UserError when `content` is not of this form
        or cannot be drawn.
        """
        requests = [self.engine.complete(request) for request in _requests_from(content, self.template)]
        return self._write(requests, f"now-{step:06d}", on_step)

    def _write(self, requests: Sequence[Request], prefix: str, on_step: OnStep | None) -> list[Path]:
        if not requests:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for index, image in enumerate(self.engine.generate(requests, on_step=on_step)):
            path = self.folder / f"{prefix}-{index}.png"
            save_png(image, path, write_parameters(requests[index], self.model_name, {}))
            paths.append(path)
        return paths

    def draw_contact_sheet(self, path: Path) -> bool:
        """One picture of all previews: a row per prompt, a column per step. False when there are none."""
        steps = sorted({int(p.name.split("-")[0]) for p in self.folder.glob("??????-*.png")})
        if not steps or not self.requests:
            return False
        num_cells = max(len(steps), len(self.requests))
        rows = [
            [open_reduced(self.folder / f"{step:06d}-{index}.png", num_cells) for step in steps]
            for index in range(len(self.requests))
        ]
        sheet = contact_sheet(
            rows,
            row_labels=[request.prompt for request in self.requests],
            column_labels=[f"step {step}" for step in steps],
        )
        save_sheet(sheet, path)
        return True


def _requests_from(content: Mapping[str, Any], template: Request) -> list[Request]:
    """Raises UserError where a value has the wrong type; what numbers can be drawn the engine knows."""
    allowed = {"seed": (int,), "steps": (int,), "cfg": (int, float)}
    if unknown := content.keys() - allowed.keys() - {"prompts"}:
        raise UserError(f"unknown key {min(unknown)!r}; known are prompts, seed, steps, cfg")
    prompts = content.get("prompts")
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UserError(f"prompts must be a list of 1 to {MAX_PROMPTS} texts")
    if not all(isinstance(prompt, str) and len(prompt) <= MAX_PROMPT_LENGTH for prompt in prompts):
        raise UserError(f"a prompt must be a text of at most {MAX_PROMPT_LENGTH} characters")
    values = {key: content[key] for key in allowed if content.get(key) is not None}
    for key, value in values.items():
        if type(value) not in allowed[key]:
            raise UserError(f"{key} must be a number, not {str(value)[:60]!r}")
    request = replace(template, **values)
    return [replace(request, prompt=prompt, seed=request.seed + index) for index, prompt in enumerate(prompts)]
