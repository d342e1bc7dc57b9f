"""Continuing a run: the newest whole checkpoint, and only if it is the same run."""

from __future__ import annotations

import logging

from lora_diffusion.errors import UserError
from lora_diffusion.training.checkpoint import newest_checkpoint
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)

_HARMLESS = {
    "run": {"output", "steps", "epochs", "save_every", "keep_checkpoints", "loader_workers", "log_every", "device"},
    "preview": None,
    "cache": None,
    "optimizer": {"lr", "text_encoder_lr", "weight_decay", "max_grad_norm"},
    "schedule": None,
    "validation": {"every"},
}
"""Settings that may change between a start and its resume: section → keys, None for the whole section."""


def resume_from_newest(trainer: Trainer) -> None:
    """Put the newest whole checkpoint into `trainer`. Raises RunError when there is none, or when what it was
    trained with differs in a way that would make it another run.
    """
    checkpoint, passed_over = newest_checkpoint(trainer.run.checkpoints)
    for line in passed_over:
        logger.warning("%s Using an earlier one.", line)
    if checkpoint is None:
        raise UserError(
            f"--resume: no whole checkpoint in {trainer.run.checkpoints}. "
            "Start without --resume, or check [run] output."
        )
    differences = _differences(checkpoint.facts["config"], trainer.facts["config"])
    harmful = [line for is_harmless, line in differences if not is_harmless]
    if checkpoint.facts["dataset"] != trainer.facts["dataset"]:
        harmful.append(_dataset_difference(checkpoint.facts["dataset"], trainer.facts["dataset"]))
    if harmful:
        raise UserError(
            "--resume: this is not the run that was started:\n  " + "\n  ".join(harmful) + "\n"
            "Restore these, or train the changed config in another [run] output."
        )
    for _, line in differences:
        logger.info("resuming with a changed setting: %s", line)
    trainer.restore(checkpoint)
    logger.info("resuming at step %d of %d", trainer.step, trainer.plan.steps)


def _differences(old: dict[str, object], new: dict[str, object]) -> list[tuple[bool, str]]:
    """(harmless, "section.key: old → new") for every setting that changed."""
    lines: list[tuple[bool, str]] = []
    for section in sorted(old.keys() | new.keys()):
        before, after = old.get(section), new.get(section)
        allowed = _HARMLESS.get(section, set())
        if not isinstance(before, dict) or not isinstance(after, dict):
            if before != after:
                lines.append((section in _HARMLESS and allowed is None, f"[{section}]: {before} → {after}"))
            continue
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                harmless = section in _HARMLESS and (allowed is None or key in allowed)
                lines.append((harmless, f"[{section}] {key}: {before.get(key)} → {after.get(key)}"))
    return lines


def _dataset_difference(old: dict[str, str], new: dict[str, str]) -> str:
    added, removed = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    recaptioned = sum(old[key] != new[key] for key in old.keys() & new.keys())
    return f"the data set changed: {added} pictures added, {removed} removed, {recaptioned} captions edited"
