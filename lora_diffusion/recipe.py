"""From a config to a trainer, where settings meet classes: read it to see how a run is wired.

Its parts: recipe_base, recipe_data, recipe_adapters.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from pydantic import ValidationError

from lora_diffusion import __version__
from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.config import TrainConfig
from lora_diffusion.data.cache import LatentCache, TextCache
from lora_diffusion.data.folder import write_report
from lora_diffusion.errors import UserError
from lora_diffusion.formats.argument import parse_adapter
from lora_diffusion.formats.metadata import TrainingFacts, build_metadata
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.base import Conditioning, DiffusionModel
from lora_diffusion.models.compiling import check_compiler, compile_blocks
from lora_diffusion.models.precision import DTYPES, resolve_device, resolve_precision
from lora_diffusion.progress import Track, silent
from lora_diffusion.recipe_adapters import Adapters, hashes_of_merged, learning_rates, parameter_groups
from lora_diffusion.recipe_base import load_base, prepare_model
from lora_diffusion.recipe_data import (
    SharedBase,
    TrainingSet,
    caption_options,
    fill_caches,
    read_training_set,
    token_counts,
)
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.batches import BatchSource, DrawOptions, Share, SourceOptions
from lora_diffusion.training.export import Exporter
from lora_diffusion.training.optimizers import build_optimizer, check_optimizer, learning_rate_curve
from lora_diffusion.training.plan import Launch, Plan
from lora_diffusion.training.previews import Previewer
from lora_diffusion.training.quiet_step import QuietMember, QuietStep
from lora_diffusion.training.regularise import Regulariser
from lora_diffusion.training.resume import resume_from_newest
from lora_diffusion.training.step import DenoisingLoss, cached_text, train_only_adapters
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training.validation import Validator

logger = logging.getLogger(__name__)


def build(
    config: TrainConfig, run: RunFolder, accelerator: Accelerator, *, resume: bool, track: Track = silent
) -> Trainer:
    """Everything a run needs, ready to `fit()`. Raises UserError before any training when an input is wrong."""
    dtype = resolve_precision(config.run.precision, accelerator.device)
    model = load_base(config, dtype, accelerator.device, track)
    return build_on(SharedBase(model), config, run, accelerator, resume=resume, track=track)


def build_on(
    base: SharedBase,
    config: TrainConfig,
    run: RunFolder,
    accelerator: Accelerator,
    *,
    resume: bool,
    is_shared: bool = False,
    track: Track = silent,
) -> Trainer:
    """`build` on a base that is loaded already and has no adapters in it.

    is_shared: others are built on it too, so nothing of it is released.
    """
    model = base.model
    if config.model.compile:
        check_compiler(accelerator.device)
    check_optimizer(config.optimizer.name)
    previewer = make_previewer(config, run, model)
    data = read_training_set(config, model, accelerator.num_processes, track)
    run_steps(config, data)
    with accelerator.main_process_first():  # one process fills the caches, the others find them filled
        latents, text = fill_caches(config, base, data, track)
    num_pixels = data.pixels_at_once(model, config.run.batch_size) * base.num_trainings
    adapters = prepare_model(config, model, num_pixels, track, is_shared=is_shared, is_resumed=resume)
    if config.model.compile:  # not in prepare_model: `check` would wait for minutes to time a step
        compile_blocks(model.unet)
    trainer = _assemble(config, run, accelerator, model, data, latents, text, adapters, previewer)
    if resume:
        resume_from_newest(trainer, _completed)
    if accelerator.is_main_process:
        write_report(run.dataset_report, data.scans, token_counts(config, model, data), config.model.max_tokens)
    return trainer


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of devices and processes. The loss scaler is on for fp16 only."""
    device = resolve_device(config.run.device)
    uses_fp16 = resolve_precision(config.run.precision, device) == torch.float16
    # Several processes have to be told that adapters may go without a gradient: those that module dropout leaves out,
    # and those of a text encoder's layers behind the one that is read.
    may_be_unused = config.adapter.module_dropout > 0 or config.adapter.text_encoder
    ddp = DistributedDataParallelKwargs(find_unused_parameters=may_be_unused)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="fp16" if uses_fp16 else "no", kwargs_handlers=[ddp])


# Assembly


def _assemble(
    config: TrainConfig,
    run: RunFolder,
    accelerator: Accelerator,
    model: DiffusionModel,
    data: TrainingSet,
    latents: LatentCache,
    text: TextCache,
    adapters: Adapters,
    previewer: Previewer,
) -> Trainer:
    loss, optimizer, parameters = _what_learns(config, model, adapters, accelerator.device)
    steps = run_steps(config, data)
    started_at = time.time()
    text_cache = None if config.adapter.text_encoder else text

    def encode(captions: Sequence[str]) -> Conditioning:
        if text_cache is None:
            return loss.encode(tuple(captions))
        return cached_text(text_cache, captions, accelerator.device)

    validator = Validator(data.validation, latents, encode, config.run.seed, rows=config.run.batch_size)
    exporter = Exporter(
        parts=model.parts,
        adapters=adapters,
        metadata=lambda step: build_metadata(
            _facts(config, model, data, steps, step, started_at), only_minimum=config.run.metadata == "minimal"
        ),
        dtype=DTYPES[config.run.save_precision],
        family=model.family,
        format=config.run.save_format,
    )
    named = {f"{part}.{path}": adapter for part, group in adapters.items() for path, adapter in group.items()}
    return Trainer(
        accelerator=accelerator,
        loss=loss,
        source=_batch_source(config, model, data, latents, accelerator),
        text=text_cache,
        parameters=parameters,
        optimizer=optimizer,
        learning_rate_curve=learning_rate_curve(
            config.schedule.name,
            warmup_steps=config.schedule.warmup_steps,
            steps=steps,
            min_lr_ratio=config.schedule.min_lr_ratio,
        ),
        plan=_plan(config, steps, accelerator),
        run=run,
        exporter=exporter,
        regulariser=Regulariser(named, config.run.seed, config.adapter.max_norm),
        previewer=previewer,
        validator=validator if data.validation else None,
        facts={
            "config": config.model_dump(mode="json"),
            "dataset": data.fingerprint,
            "global_batch_size": config.run.batch_size * accelerator.num_processes,
            "base": model.fingerprint,
            "merged": hashes_of_merged(config),
        },
        name=config.run.name,
    )


def step_as_launched(
    config: TrainConfig, model: DiffusionModel, adapters: Adapters, device: torch.device
) -> QuietStep | None:
    """One step of a run of one process, as that launches it; None where it launches operations one by one."""
    launch = launch_of(config, device, num_processes=1)
    if launch == "eager":
        return None
    loss, optimizer, parameters = _what_learns(config, model, adapters, device)
    modules = [adapter for by_path in adapters.values() for adapter in by_path.values()]
    member = QuietMember(loss, modules, optimizer, parameters, config.optimizer.max_grad_norm)
    return QuietStep({0: member}, JointLayout(), device, as_graph=launch == "graph")


def _what_learns(
    config: TrainConfig, model: DiffusionModel, adapters: Adapters, device: torch.device
) -> tuple[DenoisingLoss, torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """(the loss of `model` on `device`, the optimiser, all that it changes); everything else is frozen."""
    groups = parameter_groups(config, adapters)
    parameters = [parameter for group in groups for parameter in group["params"]]
    train_only_adapters(model, parameters)
    model.schedule = model.schedule.to(device)
    loss = DenoisingLoss(
        model,
        loss=config.loss.kind,
        weighting="min-snr" if config.loss.min_snr_gamma else "none",
        gamma=config.loss.min_snr_gamma or 0.0,
        clip_skip=config.model.clip_skip,
        chunks=config.model.max_tokens // 75,
    )
    settings = config.optimizer
    optimizer = build_optimizer(
        settings.name, groups, weight_decay=settings.weight_decay, betas=settings.betas, eps=settings.eps
    )
    return loss, optimizer, parameters


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier version with the defaults of what it did not know; as it is if it cannot be read now."""
    try:
        return TrainConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def run_steps(config: TrainConfig, data: TrainingSet) -> int:
    """Optimiser steps of the whole run, from `steps` or `epochs`. Raises UserError if the warm-up takes them all."""
    if config.run.steps is not None:
        return config.run.steps
    micro_batches = (config.run.epochs or 0) * data.batches.batches_per_epoch
    steps = -(-micro_batches // config.run.gradient_accumulation)
    if config.schedule.warmup_steps >= steps:
        raise UserError(
            f"schedule.warmup_steps is {config.schedule.warmup_steps}, but run.epochs = {config.run.epochs} makes "
            f"{steps} steps of this data set: the warm-up must be shorter."
        )
    return steps


def _batch_source(
    config: TrainConfig, model: DiffusionModel, data: TrainingSet, latents: LatentCache, accelerator: Accelerator
) -> BatchSource:
    high = min(config.loss.timestep_max, model.schedule.num_steps)
    return BatchSource(
        samples=data.training,
        sources=[SourceOptions(caption_options(table), table.flip) for table in config.dataset],
        batches=data.batches,
        latents=latents,
        draw=DrawOptions(timesteps=(config.loss.timestep_min, high), noise_offset=config.loss.noise_offset),
        share=Share(accelerator.process_index, accelerator.num_processes, config.run.gradient_accumulation),
    )


def _plan(config: TrainConfig, steps: int, accelerator: Accelerator) -> Plan:
    return Plan(
        steps=steps,
        accumulation=config.run.gradient_accumulation,
        max_grad_norm=config.optimizer.max_grad_norm,
        save_every=config.run.save_every,
        keep_checkpoints=config.run.keep_checkpoints,
        preview_every=config.preview.every,
        validate_every=config.validation.every,
        log_every=config.run.log_every,
        loader_workers=config.run.loader_workers,
        launch=launch_of(config, accelerator.device, accelerator.num_processes),
        compiles=config.model.compile,
    )


def launch_of(config: TrainConfig, device: torch.device, num_processes: int) -> Launch:
    """How steps reach the device: whole where nothing in a step needs the host: no draws, no branches on values.

    On a CPU in bfloat16 steps are of the same kind without that, too: factors are cast at once and computed together.
    """
    dtype, is_cpu = resolve_precision(config.run.precision, device), device.type == "cpu"
    is_narrow_on_cpu = is_cpu and dtype == torch.bfloat16
    if device.type not in ("cpu", "cuda") or not (config.run.cuda_graph or is_narrow_on_cpu):
        return "eager"
    adapter = config.adapter
    obstacles = {
        "several processes": num_processes > 1,
        'precision = "fp16"': dtype == torch.float16,
        "dropout": adapter.dropout + adapter.rank_dropout + adapter.module_dropout > 0,
        "adapter.max_norm": adapter.max_norm > 0,
        "adapter.text_encoder": adapter.text_encoder,
        f'optimizer.name = "{config.optimizer.name}"': config.optimizer.name != "adamw",
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        if config.run.cuda_graph:
            logger.info("Steps are launched one operation at a time, not as a whole: %s.", ", ".join(found))
        return "eager"
    # What inductor made for a CPU is no operation of the dispatcher, and so no recording would have it.
    is_whole = config.run.cuda_graph and not (is_cpu and config.model.compile)
    return "graph" if is_whole else "quiet"


def make_previewer(config: TrainConfig, run: RunFolder, model: DiffusionModel) -> Previewer:
    """Raises UserError when a preview cannot be drawn as asked, for example in this size."""
    preview, engine = config.preview, Engine(model)
    template = Request(
        prompt="",
        negative=preview.negative,
        seed=preview.seed,
        steps=preview.steps,
        cfg=preview.cfg,
        size=preview.size,
        sampler=preview.sampler,
        clip_skip=config.model.clip_skip,
    )
    requests = [
        engine.complete(replace(template, prompt=prompt, seed=preview.seed + index))
        for index, prompt in enumerate(preview.prompts)
    ]
    return Previewer(engine, requests, template, run.previews, Path(config.model.path).name)


def _facts(
    config: TrainConfig, model: DiffusionModel, data: TrainingSet, steps: int, step: int, started_at: float
) -> TrainingFacts:
    """What the adapter's metadata says. No paths: of folders only the last name."""
    run, table = config.run, config.dataset[0]
    width, height = table.resolution if isinstance(table.resolution, tuple) else (table.resolution,) * 2
    micro_batches = step * run.gradient_accumulation
    return TrainingFacts(
        output_name=run.name,
        base_model=config.model.path,
        base_model_version=model.base_model_version,
        architecture=model.architecture,
        prediction=model.schedule.prediction,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        resolution=(width, height),
        seed=run.seed,
        steps=step,
        max_steps=steps,
        epoch=-(-micro_batches // data.batches.batches_per_epoch),
        num_epochs=-(-steps * run.gradient_accumulation // data.batches.batches_per_epoch),
        started_at=started_at,
        finished_at=time.time(),
        num_train_images=len(data.training),
        batch_size=run.batch_size,
        gradient_accumulation=run.gradient_accumulation,
        gradient_checkpointing=bool(config.model.gradient_checkpointing),
        unet_lr=config.optimizer.lr,
        text_encoder_lr=learning_rates(config)["text_encoder"] if config.adapter.text_encoder else None,
        lr_schedule=config.schedule.name,
        warmup_steps=config.schedule.warmup_steps,
        optimizer=config.optimizer.name,
        precision=run.precision,
        clip_skip=config.model.clip_skip,
        max_tokens=config.model.max_tokens,
        noise_offset=config.loss.noise_offset,
        min_snr_gamma=config.loss.min_snr_gamma,
        loss=config.loss.kind,
        max_grad_norm=config.optimizer.max_grad_norm,
        caption_dropout=table.caption_dropout,
        image_counts={
            str(table.path): (table.repeats, len(scan.samples))
            for table, scan in zip(config.dataset, data.scans, strict=True)
        },
        tag_frequency=_tag_frequency(config, data),
        zero_terminal_snr=bool(model.scheduler_config["rescale_betas_zero_snr"]),
        bucket_counts=Counter((sample.bucket.width, sample.bucket.height) for sample in data.training),
        comment=_comment(config),
        program_version=__version__,
    )


def _tag_frequency(config: TrainConfig, data: TrainingSet) -> dict[str, Counter[str]]:
    """How often each comma-separated part of the captions occurs, by data set folder."""
    return {
        str(table.path): Counter(
            tag for sample in scan.samples for part in sample.caption.split(",") if (tag := part.strip())
        )
        for table, scan in zip(config.dataset, data.scans, strict=True)
    }


def _comment(config: TrainConfig) -> str | None:
    """What a user of the file must know: which adapters the base had in it, by name and strength."""
    merged = [(path.name, strength) for path, strength in map(parse_adapter, config.model.merge)]
    return f"for a base with {', '.join(f'{name}:{x:g}' for name, x in merged)} merged in" if merged else None
