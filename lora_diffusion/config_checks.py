"""Settings that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_diffusion.config_errors import KeyPath, Problem

if TYPE_CHECKING:
    from lora_diffusion.config import DatasetConfig, TrainConfig


def conflicts(config: TrainConfig) -> Iterator[tuple[set[KeyPath], Problem]]:
    """Values that are right alone and wrong together: the keys, and what to do."""
    run, loss, model, prediction = config.run, config.loss, config.model, config.model.prediction

    def conflict(message: str, *keys: KeyPath) -> tuple[set[KeyPath], Problem]:
        return set(keys), Problem(keys[0], message)

    steps, epochs = ("run", "steps"), ("run", "epochs")
    if run.steps is None and run.epochs is None:
        yield conflict(
            "`run.steps` is missing; give it or `run.epochs`, each a whole number of at least 1", steps, epochs
        )
    if run.steps is not None and run.epochs is not None:
        yield conflict("`run.steps` and `run.epochs` are both given; keep the one that should decide", epochs, steps)
    warmup = config.schedule.warmup_steps
    if run.steps is not None and warmup >= run.steps:
        message = f"`schedule.warmup_steps` is {warmup}, but `run.steps` is {run.steps}: the warm-up must be shorter"
        yield conflict(message, ("schedule", "warmup_steps"), steps)
    if loss.timestep_min >= loss.timestep_max:
        message = (
            f"`loss.timestep_min` is {loss.timestep_min}; expected less than `loss.timestep_max` ({loss.timestep_max})"
        )
        yield conflict(message, ("loss", "timestep_min"), ("loss", "timestep_max"))
    if run.device == "cpu" and run.precision == "fp16":
        message = '`run.precision` is "fp16" and `run.device` is "cpu", which trains in "fp32" or "bf16" only'
        yield conflict(message, ("run", "precision"), ("run", "device"))
    if run.device == "cpu" and model.attention == "xformers":
        message = '`model.attention` is "xformers", which needs a GPU, and `run.device` is "cpu"; use "auto"'
        yield conflict(message, ("model", "attention"), ("run", "device"))
    if model.zero_terminal_snr is True and prediction == "epsilon":
        message = (
            '`model.zero_terminal_snr` is true and `model.prediction` is "epsilon": at the last timestep such a model '
            'has nothing to predict from. Use prediction = "v" or "auto"'
        )
        yield conflict(message, ("model", "zero_terminal_snr"), ("model", "prediction"))
    for index, dataset in enumerate(config.dataset):
        yield from _bucket_conflicts(index, dataset)


def _bucket_conflicts(index: int, dataset: DatasetConfig) -> Iterator[tuple[set[KeyPath], Problem]]:
    size = dataset.resolution
    width, height = size if isinstance(size, tuple) else (size, size)
    resolution: KeyPath = ("dataset", index, "resolution")
    if dataset.bucket_min is not None and dataset.bucket_min > min(width, height):
        key: KeyPath = ("dataset", index, "bucket_min")
        message = (
            f"`bucket_min` is {dataset.bucket_min}, more than the shorter side of `resolution` ({min(width, height)})"
        )
        yield {key, resolution}, Problem(key, message)
    if dataset.bucket_max is not None and dataset.bucket_max < max(width, height):
        key = ("dataset", index, "bucket_max")
        message = (
            f"`bucket_max` is {dataset.bucket_max}, less than the longer side of `resolution` ({max(width, height)})"
        )
        yield {key, resolution}, Problem(key, message)


def ineffective(config: TrainConfig) -> Iterator[str]:
    """Settings that will have no effect, and what to change."""
    run, steps = config.run, config.run.steps
    if steps is not None and "save_every" in run.model_fields_set and run.save_every > steps:
        yield f"run.save_every is {run.save_every}, more than run.steps ({steps}): the only checkpoint is at the end"
    if steps is not None and "every" in config.preview.model_fields_set and config.preview.every > steps:
        yield f"preview.every is {config.preview.every}, more than run.steps ({steps}): previews at start and end only"
    if config.optimizer.text_encoder_lr is not None and not config.adapter.text_encoder:
        yield "optimizer.text_encoder_lr has no effect: set adapter.text_encoder = true to train the text encoder"
    for index, dataset in enumerate(config.dataset):
        if dataset.keep_tokens and not dataset.shuffle_tags and not dataset.tag_dropout:
            yield f"dataset.{index}.keep_tokens has no effect without shuffle_tags or tag_dropout"
        if not dataset.buckets and dataset.model_fields_set & {"bucket_min", "bucket_max"}:
            yield f"dataset.{index}: bucket_min and bucket_max have no effect with buckets = false"
