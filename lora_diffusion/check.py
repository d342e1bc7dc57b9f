"""`lora-diffusion check`: what a run will do, told before it starts."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.config import TrainConfig
from lora_diffusion.data.duplicates import find_near_duplicates
from lora_diffusion.data.folder import NO_CAPTION, build_report
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.device_lock import NoLongerWanted, shared_device
from lora_diffusion.models.base import Conditioning, DiffusionModel
from lora_diffusion.models.compiling import check_compiler
from lora_diffusion.models.precision import resolve_device, resolve_precision
from lora_diffusion.progress import Track, silent
from lora_diffusion.recipe import make_previewer, run_steps, step_as_launched
from lora_diffusion.recipe_base import load_base, prepare_model
from lora_diffusion.recipe_data import TrainingSet, latent_batch_size, read_training_set, token_counts
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.estimate import StepEstimate, encoding_bytes, estimate_step, estimate_validation
from lora_diffusion.training.memory import PeakMemory
from lora_diffusion.training.optimizers import check_optimizer

_PATIENCE_S = 30.0  # the picture engine lets others have the device every 15 s
_CROP_LOSS_WORTH_A_LOOK = 0.2
_LISTED = 8  # names per finding on the terminal; --json has them all


@dataclass(frozen=True)
class Finding:
    """Something to look at: `what` in one sentence, `items` the files or values it is about."""

    what: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What a run would do. times in seconds, memory in bytes, `largest_crop_loss` a share of the area.

    training_seconds: of all steps and validations. validation_seconds: of the latter.
    warnings: what was logged as such meanwhile.
    """

    base: str
    family: str
    prediction: str
    device: str
    precision: str
    images: int
    images_left_out: int
    images_for_validation: int
    captions_missing: int
    captions_cut: int
    longest_caption_tokens: int
    buckets: dict[str, int]
    largest_crop_loss: float
    images_per_epoch: int
    steps_per_epoch: float
    steps: int
    epochs: float
    warmup_steps: int
    effective_batch_size: int
    adapter_layers: int
    adapter_parameters: int
    seconds_per_step: float
    training_seconds: float
    validation_seconds: float
    memory_bytes: int
    largest_batch: int
    memory_limit_bytes: int
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def check_run(config: TrainConfig, track: Track = silent) -> CheckReport:
    """Read every picture and caption, load the base, train it for some steps. Writes nothing. Raises UserError.

    Holds a GPU meanwhile, if whoever started this process wants that.
    """
    device = resolve_device(config.run.device)
    with _alone_on(device), _warnings_kept() as warnings:
        report = _check(config, device, track)
    return replace(report, warnings=tuple(dict.fromkeys(warnings)))


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """What our modules warn of meanwhile; it is logged all the same."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(record.getMessage())
    ours = logging.getLogger("lora_diffusion")
    ours.addHandler(handler)
    try:
        yield kept
    finally:
        ours.removeHandler(handler)


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Hold a GPU, whose memory may not do for two. Two processes on a CPU are slow, and both arrive."""
    if device.type == "cpu":
        yield
        return
    deadline = time.monotonic() + _PATIENCE_S
    try:
        with shared_device(device.type, device.index, "a check", lambda: time.monotonic() > deadline):
            yield
    except NoLongerWanted as busy:
        raise UserError(
            f"The device is in use ({busy}), and a check trains some steps on it. Check again when it is free, or "
            "pause what uses it."
        ) from None


def _check(config: TrainConfig, device: torch.device, track: Track) -> CheckReport:
    dtype = resolve_precision(config.run.precision, device)
    if config.model.compile:
        check_compiler(device)
    check_optimizer(config.optimizer.name)
    with PeakMemory(device) as loading:
        model = load_base(config, dtype, device, track)
    make_previewer(config, RunFolder(config.run.output), model)
    data = read_training_set(config, model, 1, track, writes=False)
    tokens = token_counts(config, model, data)
    data_report = build_report(data.scans, tokens, config.model.max_tokens)
    steps = run_steps(config, data)
    encoding = encoding_bytes(model, data.largest, latent_batch_size(data))
    text = _encoder(config, model)
    prepared = prepare_model(config, model, data.pixels_at_once(model, config.run.batch_size), track)
    adapters = [adapter for group in prepared.values() for adapter in group.values()]
    step = estimate_step(
        model,
        data.largest,
        config.run.batch_size,
        encode=text,
        accumulation=config.run.gradient_accumulation,
        other_shapes=data.batches.shapes - {(data.largest, config.run.batch_size)},
        launch=step_as_launched(config, model, prepared, device),
    )
    validation = 0.0
    if data.validation:
        rows = max(1, min(config.run.batch_size, step.largest_batch))
        num_validations = math.ceil(steps / config.validation.every)  # the last step has one, too
        per_picture = estimate_validation(model, data.largest, rows, text)
        validation = per_picture * len(data.validation) * num_validations
    steps_per_epoch = data.batches.batches_per_epoch / config.run.gradient_accumulation
    return CheckReport(
        base=config.model.path,
        family=model.family,
        prediction=model.schedule.prediction,
        device=str(device),
        precision=str(dtype).removeprefix("torch."),
        images=data_report["summary"]["images"],
        images_left_out=data_report["summary"]["left_out"],
        images_for_validation=len(data.validation),
        captions_missing=sum(note["kind"].startswith(NO_CAPTION) for note in data_report["notes"]),
        captions_cut=data_report["summary"]["captions_cut"],
        longest_caption_tokens=max(tokens.values(), default=0),
        buckets=data_report["summary"]["buckets"],
        largest_crop_loss=max((entry["lost"] for entry in data_report["used"]), default=0.0),
        images_per_epoch=data.batches.num_draws_per_epoch,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        warmup_steps=config.schedule.warmup_steps,
        effective_batch_size=config.run.batch_size * config.run.gradient_accumulation,
        adapter_layers=len(adapters),
        adapter_parameters=_num_trained(adapters),
        seconds_per_step=step.seconds,
        training_seconds=step.seconds * steps + validation,
        validation_seconds=validation,
        memory_bytes=max(loading.bytes, encoding, step.memory_bytes),
        largest_batch=step.largest_batch,
        memory_limit_bytes=step.limit_bytes,
        findings=_findings(config, data, data_report, step, track),
    )


def _encoder(config: TrainConfig, model: DiffusionModel) -> Callable[[], Conditioning]:
    """What a step gets of one caption: encoded there if the text encoder is trained, otherwise beforehand."""

    def encode() -> Conditioning:
        return model.encode_text([""], clip_skip=config.model.clip_skip, chunks=config.model.max_tokens // 75)

    if config.adapter.text_encoder:
        return encode
    with torch.no_grad():
        text = encode().to(dtype=torch.float32)  # as the cache has it
    return lambda: text


def _num_trained(adapters: list[Adapter]) -> int:
    return sum(parameter.numel() for adapter in adapters for parameter in adapter.trained())


def _findings(
    config: TrainConfig, data: TrainingSet, report: dict[str, Any], step: StepEstimate, track: Track
) -> tuple[Finding, ...]:
    """Everything a person may want to act on, the gravest first."""
    notes: dict[str, list[str]] = {}
    for note in report["notes"]:
        notes.setdefault(note["kind"], []).append(f"{note['file']}: {note['message']}")
    near = find_near_duplicates([*data.training, *data.validation], track=track)
    found = [
        Finding("batch size beyond the memory that is free", _too_large(config.run.batch_size, step)),
        Finding("settings without effect", config.warnings()),
        Finding("files left out", tuple(f"{entry['file']}: {entry['reason']}" for entry in report["left_out"])),
        Finding(
            "captions longer than the text encoder reads: the end is cut off",
            tuple(f"{entry['file']}: {entry['tokens']} tokens" for entry in report["used"] if entry["is_caption_cut"]),
        ),
        Finding(
            "pictures that lose more than a fifth of their area to the crop",
            tuple(
                f"{entry['file']}: {entry['lost']:.0%}"
                for entry in report["used"]
                if entry["lost"] > _CROP_LOSS_WORTH_A_LOOK
            ),
        ),
        *(Finding(kind, tuple(lines)) for kind, lines in notes.items()),
        Finding("pictures that look almost the same", tuple(f"{a.name} and {b.name}" for a, b in near)),
    ]
    return tuple(finding for finding in found if finding.items)


def _too_large(batch_size: int, step: StepEstimate) -> tuple[str, ...]:
    if batch_size <= step.largest_batch:
        return ()
    free = f"{step.limit_bytes / 2**30:.1f} GB"
    remedy = "[model] gradient_checkpointing = true, a smaller resolution or [model] quantise need less"
    if step.largest_batch == 0:
        return (f"not even one picture at a time fits into {free}: {remedy}",)
    return (f"run.batch_size is {batch_size}, but {step.largest_batch} fits into {free}; {remedy}",)


def render_report(report: CheckReport) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2))
    for label, value in _rows(report):
        table.add_row(label, value)
    console.print(table)
    findings = [finding for finding in (Finding("warnings", report.warnings), *report.findings) if finding.items]
    for finding in findings:
        console.print(f"\n[bold yellow]{len(finding.items)} × {finding.what}[/]")
        for item in finding.items[:_LISTED]:
            console.print(f"  {item}", markup=False, highlight=False)
        if len(finding.items) > _LISTED:
            console.print(f"  … and {len(finding.items) - _LISTED} more (--json lists all)")
    if not findings:
        console.print("\n[green]Nothing to mend.[/]")


def _rows(report: CheckReport) -> list[tuple[str, str]]:
    buckets = ", ".join(f"{size} ({count})" for size, count in report.buckets.items())
    validation = f" ({_duration(report.validation_seconds)} of it for validation)" if report.validation_seconds else ""
    return [
        ("base", f"{report.base}: {report.family}, {report.prediction}-prediction"),
        ("pictures", f"{report.images} used, {report.images_left_out} left out, "
                     f"{report.images_for_validation} kept for validation"),
        ("captions", f"{report.captions_missing} missing, {report.captions_cut} cut, "
                     f"longest {report.longest_caption_tokens} tokens"),
        ("buckets", buckets),
        ("crop", f"at most {report.largest_crop_loss:.0%} of a picture is cut away"),
        ("epoch", f"{report.images_per_epoch} pictures, {report.steps_per_epoch:.1f} steps"),
        ("run", f"{report.steps} steps = {report.epochs:.1f} epochs, {report.warmup_steps} of them warm-up, "
                f"{report.effective_batch_size} pictures per step"),
        ("adapter", f"{report.adapter_layers} layers, {report.adapter_parameters:,} trained values"),
        ("estimate", f"{report.seconds_per_step:.2f} s per step, "
                     f"{_duration(report.training_seconds)} in all{validation}, "
                     f"{report.memory_bytes / 2**30:.1f} GB on {report.device} in {report.precision}"),
        ("largest batch", f"{report.largest_batch} would fit into the {report.memory_limit_bytes / 2**30:.1f} GB "
                          "that are free"),
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
