"""Continuing a run: the newest whole checkpoint, and only if it is the same run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

from lora_diffusion.errors import UserError
from lora_diffusion.training.checkpoint import Checkpoint, newest_checkpoint
from lora_diffusion.training.optimizers import load_state
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r"""
    run\.(name|output|steps|epochs|save_every|keep_checkpoints|loader_workers|log_every|device|cuda_graph)
    | run\.(save_precision|save_format|metadata)
    | run\.batch_size           # the batch of all processes together is compared by itself
    | dataset\.\d+\.path        # pictures and captions are compared by themselves
    | model\.(attention|gradient_checkpointing|compile)
    | optimizer\.(lr|text_encoder_lr|text_encoder_2_lr|weight_decay|max_grad_norm)
    | (preview|cache|schedule)\..*
    """,
    re.VERBOSE,
)
"""Settings that may change between a start and its resume."""


def resume_from_newest(trainer: Trainer, complete: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put the newest whole checkpoint into `trainer`. Raises UserError when there is none, or when what it was
    trained with differs in a way that would make it another run.

    complete: gives a config that an earlier version wrote the settings that came since, with the values that change
    nothing.
    """
    checkpoint, passed_over = newest_checkpoint(trainer.run.checkpoints)
    for line in passed_over:
        logger.warning("%s Using an earlier one.", line)
    if checkpoint is None:
        raise UserError(
            f"--resume: no whole checkpoint in {trainer.run.checkpoints}. "
            "Start without --resume, or check [run] output."
        )
    before, now = checkpoint.facts, trainer.facts
    old, new = complete(before["config"]), now["config"]
    differences = _differences(old, new)
    harmless = _harmless_keys(old, new)
    if "base" in before:  # earlier versions did not note down which weights it has
        harmless.add("model.path")
    harmful = [line for key, line in differences if key not in harmless and not _HARMLESS.fullmatch(key)]
    harmful += _base_differences(before.get("base", now["base"]), now["base"])
    if before["global_batch_size"] != now["global_batch_size"]:
        harmful.append(
            f"pictures per step, all processes together: {before['global_batch_size']} → {now['global_batch_size']} "
            "(change run.batch_size so that batch_size times processes stays the same)"
        )
    if before.get("merged", []) != now["merged"]:
        harmful.append("model.merge: the content of an adapter file that is merged into the base changed")
    if before["dataset"] != now["dataset"]:
        harmful.append(_dataset_difference(before["dataset"], now["dataset"]))
    if harmful:
        raise UserError(
            "--resume: this is not the run that was started:\n  " + "\n  ".join(harmful) + "\n"
            "Restore these, or train the changed config in another [run] output."
        )
    if checkpoint.step > trainer.plan.steps:
        raise UserError(
            f"--resume: the run is at step {checkpoint.step} already, and run.steps or run.epochs asks for "
            f"{trainer.plan.steps}. Ask for {checkpoint.step} or more. To go back to an earlier checkpoint, delete the "
            f"newer folders in {trainer.run.checkpoints}."
        )
    for _, line in differences:
        logger.info("resuming with a changed setting: %s", line)
    _restore(trainer, checkpoint)
    logger.info("resuming at step %d of %d", trainer.step, trainer.plan.steps)


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Settings of the optimiser stay those of the current config."""
    trainer.exporter.load_tensors(checkpoint.adapter)
    load_state(trainer.optimizer, checkpoint.optimizer)
    if trainer.accelerator.scaler is not None and checkpoint.facts.get("scaler"):
        trainer.accelerator.scaler.load_state_dict(checkpoint.facts["scaler"])
    trainer.step = checkpoint.step


def _harmless_keys(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """What may change beside `_HARMLESS`: how often is validated, but not whether pictures are held back for it."""
    before, now = old.get("validation", {}), new["validation"]
    return {"validation.every"} if bool(before.get("every")) == bool(now["every"]) or not now["fraction"] else set()


def _base_differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    parts = [part for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)]
    return [f"model.path: its {', '.join(parts)} changed since the start"] if parts else []


def _differences(old: dict[str, object], new: dict[str, object]) -> list[tuple[str, str]]:
    """(key, "key: old → new") for every setting that changed."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        (key, f"{key}: {before.get(key)} → {after.get(key)}")
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flatten(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """("dataset.0.path", value) for every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, value
        return
    for key, item in items:
        yield from _flatten(item, f"{path}.{key}" if path else key)


def _dataset_difference(old: dict[str, str], new: dict[str, str]) -> str:
    added, removed = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    recaptioned = sum(old[key] != new[key] for key in old.keys() & new.keys())
    return f"the data set changed: {added} pictures added, {removed} removed, {recaptioned} captions edited"
