"""One training run in its folder: lock, log, train, and leave behind what a person wants to look at."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import RunError
from lora_diffusion.files import write_text_atomically
from lora_diffusion.generation.plots import loss_plot
from lora_diffusion.jobs.device_lock import NoLongerWanted, shared_device
from lora_diffusion.jobs.record import log_file, recorded_end
from lora_diffusion.models.libraries import without_compiler
from lora_diffusion.progress import bar, silent
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.export import write_model_card
from lora_diffusion.training.memory import is_out_of_memory
from lora_diffusion.training.signals import ends_at_once
from lora_diffusion.training.tracking import latest_per_step, read_metrics
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact-sheet.png"
LOSS_PLOT = "loss.png"
KIND_NAMES = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


def run_training(config: TrainConfig, *, resume: bool) -> Path | None:
    """Train `config` in its run folder and return the adapter file. Raises UserError or RunError.

    None: it was asked to stop before its first step.
    Of several processes only the main one locks, writes and speaks.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config.run.output)
    is_main = accelerator.is_main_process
    if not is_main:
        logging.getLogger("lora_diffusion").setLevel(logging.ERROR)
    with (
        compiler_if_wanted(config, accelerator),
        run.lock() if is_main else nullcontext(),
        recorded(config, run, resume=resume, num_processes=accelerator.num_processes) if is_main else nullcontext(),
    ):
        accelerator.wait_for_everyone()
        try:
            with ExitStack() as held:
                with before_first_step():
                    if is_main:
                        held.enter_context(_device(config, run, accelerator))
                    trainer = build(config, run, accelerator, resume=resume, track=bar if is_main else silent)
                return _train(config, trainer, is_main=is_main)
        except NoLongerWanted:
            if is_main:
                end_untrained(run)
            return None


def compiler_if_wanted(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Around a training: torch's compiler is imported for `model.compile` only, and for what several processes do."""
    is_wanted = config.model.compile or accelerator.num_processes > 1
    return nullcontext() if is_wanted else without_compiler()


@contextmanager
def before_first_step() -> Iterator[None]:
    """Inside, a signal ends at once what is going on, and NoLongerWanted is raised."""
    try:
        with ends_at_once():
            yield
    except KeyboardInterrupt as interruption:
        raise NoLongerWanted from interruption


def end_untrained(run: RunFolder) -> None:
    run.end("stopped")
    logger.info("Stopped before the first step; nothing was trained.")


@contextmanager
def recorded(
    config: TrainConfig,
    run: RunFolder,
    *,
    resume: bool,
    num_processes: int = 1,
    hears: Callable[[logging.LogRecord], bool] = lambda _: True,
) -> Iterator[None]:
    """Inside, the run's folder, which is locked, is ready and tells of the run: its log, and how it ends.

    hears: which log records belong to this run.
    """
    previous = run.prepare(resume=resume)
    with log_file(run.log, hears), recorded_end(run, lambda error: _told(error, run), resume=resume):
        _announce(config, run, previous, resume=resume, num_processes=num_processes)
        yield


def _train(config: TrainConfig, trainer: Trainer, *, is_main: bool) -> Path:
    with trainer.stop.listen():
        if is_main:
            begin_recorded(config, trainer)
        adapter = trainer.fit()
        if is_main:
            leave_behind(config, trainer, adapter)
    return adapter


def begin_recorded(config: TrainConfig, trainer: Trainer) -> None:
    """Only when the trainer is there: a resume that was refused leaves the run's settings and state as they were."""
    write_text_atomically(trainer.run.config, config.to_toml())
    trainer.run.begin(trainer.step, trainer.plan.steps)


@contextmanager
def _device(config: TrainConfig, run: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Hold the device if whoever started this process wants that; a stop is obeyed while waiting for it."""
    device = accelerator.device
    what = f"the training of {config.run.name}"
    with shared_device(device.type, device.index, what, lambda: "stop" in run.take_control()):
        yield


def _announce(config: TrainConfig, run: RunFolder, previous: Path | None, *, resume: bool, num_processes: int) -> None:
    if previous is not None:
        logger.info("The earlier run in %s moved to %s.", run.path, previous)
    for warning in config.warnings():
        logger.warning("%s", warning)
    cores = psutil.cpu_count(logical=False) or 1
    if not torch.cuda.is_available() and torch.get_num_threads() < cores and num_processes == 1:
        logger.info(
            "Training on %d of %d cores. accelerate launch --num_cpu_threads_per_process %d uses them all.",
            torch.get_num_threads(), cores, cores,
        )  # fmt: skip
    run.control.mkdir(exist_ok=True)
    if not resume:  # a run that ends while pictures are encoded still says what it was
        write_text_atomically(run.config, config.to_toml())
        run.begin(0, config.run.steps or 0)


def _told(error: BaseException, run: RunFolder) -> BaseException:
    """Running out of memory says what to change, and a full disk says that it is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"The disk is full ({error}). Free some space.{_continued(run)}")
    return _out_of_memory(run) if is_out_of_memory(error) else error


def _continued(run: RunFolder) -> str:
    return f" Continue from {run.checkpoints} with --resume." if run.has_checkpoint else ""


def _out_of_memory(run: RunFolder) -> RunError:
    peak = f" (peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GB)" if torch.cuda.is_available() else ""
    return RunError(
        f"Out of memory{peak}. Set [model] gradient_checkpointing = true; then lower [run] batch_size and raise "
        f"gradient_accumulation by the same factor; then lower [[dataset]] resolution.{_continued(run)}"
    )


def leave_behind(config: TrainConfig, trainer: Trainer, adapter: Path) -> None:
    """Loss plot, contact sheet and model card; then say where everything is."""
    run = trainer.run
    try:
        pictures = _describe(config, trainer, adapter)
    except Exception as error:  # the adapter is there, and these can be done without
        what = f"{type(error).__name__}: {error}"
        logger.warning("%s: loss plot, contact sheet and model card cannot be written (%s)", run.path, what)
        pictures = {}
    is_complete = trainer.step >= trainer.plan.steps
    run.end("finished" if is_complete else "stopped")
    if not is_complete:
        reason, step, steps = trainer.stop.reason, trainer.step, trainer.plan.steps
        rest = "everything is saved. Continue with --resume." if step else "nothing was trained."
        logger.info("Stopped (%s) at step %d of %d; %s", reason, step, steps, rest)
    for what, path in {"adapter": adapter, **pictures}.items():
        logger.info("%-18s %s", what, path)


def _describe(config: TrainConfig, trainer: Trainer, adapter: Path) -> dict[str, Path]:
    """Writes loss plot, contact sheet and model card. Returns the pictures by what they show."""
    run = trainer.run
    pictures: dict[str, Path] = {}
    if trainer.previewer.draw_contact_sheet(run.path / CONTACT_SHEET):
        pictures["before and after"] = run.path / CONTACT_SHEET
    if metrics := latest_per_step(read_metrics(run.metrics)):
        loss_plot(metrics, run.path / LOSS_PLOT, title=config.run.name)
        pictures["loss"] = run.path / LOSS_PLOT
    write_model_card(
        run.model_card,
        adapter=adapter,
        base=config.model.path,
        prompt=config.preview.prompts[0] if config.preview.prompts else "your prompt",
        kind=KIND_NAMES[config.adapter.kind],
        rank=config.adapter.rank,
        steps=trainer.step,
        readers=_readers(config, adapter),
    )
    return pictures


def _readers(config: TrainConfig, adapter: Path) -> str:
    """Which other programs take the file, and how."""
    in_diffusers = f'`pipeline.load_lora_weights("{adapter.parent.as_posix()}", weight_name="{adapter.name}")`'
    if config.run.save_format == "peft":
        return f"In diffusers 0.34 or newer: {in_diffusers}. Other programs want the kohya format."
    copy = f"In ComfyUI, Forge, A1111 or SD.Next copy `{adapter.name}` into the LoRA folder and use strength 1.0."
    if config.adapter.kind == "lora":
        return f"{copy}\nIn diffusers: {in_diffusers}."
    return f"{copy}\ndiffusers cannot read a {KIND_NAMES[config.adapter.kind]} file of this kind."
