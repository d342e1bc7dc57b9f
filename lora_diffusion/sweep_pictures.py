"""What a sweep leaves to look at: the members' last previews side by side, and their losses in one plot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.config_sweep import Member
from lora_diffusion.generation.grid import comparison_sheet, open_reduced, save_sheet
from lora_diffusion.generation.plots import losses_plot
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import latest_per_step, read_metrics

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact-sheet.png"
LOSS_PLOT = "loss.png"


def draw_contact_sheet(members: Sequence[Member], folder: Path) -> Path | None:
    """A column per member, a row per prompt and seed; None if no member has a preview."""
    pictures = {member.name: _last_previews(member) for member in members}
    rows = list(dict.fromkeys(row for own in pictures.values() for row in own))
    if not any(pictures.values()):
        return None
    num_cells = max(len(rows), len(members))
    columns = {
        member.label: [open_reduced(pictures[member.name].get(row), num_cells) for row in rows] for member in members
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(comparison_sheet(columns, [prompt for prompt, _ in rows]), folder / CONTACT_SHEET)
    logger.info("side by side       %s", folder / CONTACT_SHEET)
    return folder / CONTACT_SHEET


def draw_losses(members: Sequence[Member], folder: Path) -> Path | None:
    """The losses of all members over the steps; None if none has been logged."""
    found = {
        member.label: latest_per_step(read_metrics(RunFolder(member.config.run.output).metrics)) for member in members
    }
    curves = {label: metrics for label, metrics in found.items() if any("loss" in line for line in metrics)}
    if not curves:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    losses_plot(curves, folder / LOSS_PLOT)
    logger.info("losses             %s", folder / LOSS_PLOT)
    return folder / LOSS_PLOT


def _last_previews(member: Member) -> dict[tuple[str, int], Path]:
    """(prompt, seed) → the picture of the latest step that has one."""
    preview, run = member.config.preview, RunFolder(member.config.run.output)
    found: dict[tuple[str, int], Path] = {}
    for index, prompt in enumerate(preview.prompts):
        if pictures := sorted(run.previews.glob(f"[0-9]*-{index}.png"), key=lambda path: int(path.name.split("-")[0])):
            found[prompt, preview.seed + index] = pictures[-1]
    return found
