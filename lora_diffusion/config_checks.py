"""Settings that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_diffusion.config_errors import KeyPath, Problem

if TYPE_CHECKING:
    from lora_diffusion.config import DatasetConfig, Section, TrainConfig


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
    if model.compile:
        yield from _compile_conflicts(config)
    yield from _adapter_conflicts(config)
    for index, dataset in enumerate(config.dataset):
        yield from _bucket_conflicts(index, dataset)


def _compile_conflicts(config: TrainConfig) -> Iterator[tuple[set[KeyPath], Problem]]:
    """What torch cannot compile: draws from a generator, and kernels of other packages."""
    key: KeyPath = ("model", "compile")
    if config.model.quantise != "none":
        message = f'`model.compile` is true and `model.quantise` is "{config.model.quantise}", which cannot be compiled'
        yield {key, ("model", "quantise")}, Problem(key, message)
    if config.model.attention == "xformers":
        message = '`model.compile` is true and `model.attention` is "xformers", which cannot be compiled; use "auto"'
        yield {key, ("model", "attention")}, Problem(key, message)
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if getattr(config.adapter, name):
            message = f"`model.compile` is true and `adapter.{name}` is above 0: draws cannot be compiled; drop one"
            yield {key, ("adapter", name)}, Problem(key, message)


def _adapter_conflicts(config: TrainConfig) -> Iterator[tuple[set[KeyPath], Problem]]:
    adapter = config.adapter
    kind: KeyPath = ("adapter", "kind")

    def conflict(key: str, message: str, *others: KeyPath) -> tuple[set[KeyPath], Problem]:
        own: KeyPath = ("adapter", key)
        return {own, *others}, Problem(own, message)

    if adapter.kind in ("loha", "lokr"):
        if adapter.init != "default":
            yield conflict(
                "init", f'`adapter.init` is "{adapter.init}", which starts a lora or dora, not a {adapter.kind}', kind
            )
        for name, chance in (("dropout", adapter.dropout), ("rank_dropout", adapter.rank_dropout)):
            if chance:
                message = f"`adapter.{name}` works between the matrices of a lora or dora; a {adapter.kind} has "
                yield conflict(name, message + "`module_dropout`", kind)
    if adapter.rslora and adapter.kind == "lokr":
        yield conflict("rslora", "`adapter.rslora` is for kinds that act with alpha / rank, which lokr may not", kind)
    if adapter.max_norm and adapter.init in ("pissa", "olora"):
        message = f'`adapter.max_norm` cannot limit a change that starts from the weight itself (init "{adapter.init}")'
        yield conflict("max_norm", message, ("adapter", "init"))
    if adapter.start_from is not None and adapter.init in ("pissa", "olora"):
        message = f'`adapter.start_from` and `adapter.init` = "{adapter.init}" are two starts; keep one'
        yield conflict("start_from", message, ("adapter", "init"))
    if config.run.save_format == "peft" and adapter.kind != "lora":
        message = (
            f'`run.save_format` is "peft", which holds a lora, and `adapter.kind` is "{adapter.kind}"; use "kohya"'
        )
        key: KeyPath = ("run", "save_format")
        yield {key, kind}, Problem(key, message)


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
    preview = config.preview
    if preview.every and not preview.prompts and _is_changed(preview, "every"):
        yield "preview.every has no effect without preview.prompts: no previews are drawn"
    if steps is not None and preview.prompts and "every" in preview.model_fields_set and preview.every > steps:
        yield f"preview.every is {preview.every}, more than run.steps ({steps}): previews at start and end only"
    if not config.adapter.text_encoder:
        for key in ("text_encoder_lr", "text_encoder_2_lr", "text_encoder_steps"):
            if getattr(config.optimizer, key) is not None:
                yield f"optimizer.{key} has no effect: set adapter.text_encoder = true to train the text encoder"
    if config.adapter.lokr_factor is not None and config.adapter.kind != "lokr":
        yield f"adapter.lokr_factor has no effect with kind {config.adapter.kind!r}"
    if config.schedule.min_lr_ratio and config.schedule.name == "constant":
        yield 'schedule.min_lr_ratio has no effect with schedule.name "constant": the learning rate never falls'
    if not config.validation.every and _is_changed(config.validation, "fraction"):
        yield "validation.fraction has no effect: set validation.every to keep pictures out and measure on them"
    if not config.cache.enabled and _is_changed(config.cache, "folder"):
        yield "cache.folder has no effect with cache.enabled = false"
    for index, dataset in enumerate(config.dataset):
        if dataset.keep_tokens and not dataset.shuffle_tags and not dataset.tag_dropout:
            yield f"dataset.{index}.keep_tokens has no effect without shuffle_tags or tag_dropout"
        if not dataset.buckets and dataset.model_fields_set & {"bucket_min", "bucket_max"}:
            yield f"dataset.{index}: bucket_min and bucket_max have no effect with buckets = false"


def _is_changed(section: Section, key: str) -> bool:
    """Whether a value is not the default. A config that a run has written gives all values, the defaults too."""
    return getattr(section, key) != type(section).model_fields[key].default
