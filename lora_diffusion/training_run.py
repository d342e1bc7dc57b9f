"""One training run in its folder: lock, log, train, and leave behind what a person wants to look at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.files import write_text_atomically
from lora_diffusion.generation.plots import loss_plot
from lora_diffusion.progress import bar, silent
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import Failure, RunFolder
from lora_diffusion.training.export import write_model_card
from lora_diffusion.training.tracking import latest_per_step, read_metrics
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger("lora_diffusion")

CONTACT_SHEET = "contact-sheet.png"
LOSS_PLOT = "loss.png"


def run_training(config: TrainConfig, *, resume: bool) -> Path:
    """Train `config` in its run folder and return the adapter file. Raises UserError or RunError.

    Of several processes only the main one locks, writes and speaks.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config.run.output)
    is_main = accelerator.is_main_process
    if not is_main:
        logger.setLevel(logging.ERROR)
    with run.lock() if is_main else nullcontext():
        if is_main:
            _prepare(config, run, resume)
        accelerator.wait_for_everyone()
        with _log_file(run.log) if is_main else nullcontext(), _recorded_end(run) if is_main else nullcontext():
            trainer = build(config, run, accelerator, resume=resume, track=bar if is_main else silent)
            adapter = trainer.fit()
            if is_main:
                _leave_behind(config, run, trainer, adapter)
    return adapter


def _prepare(config: TrainConfig, run: RunFolder, resume: bool) -> None:
    previous = run.prepare(resume=resume)
    if previous is not None:
        logger.info("The earlier run in %s moved to %s.", run.path, previous)
    for warning in config.warnings():
        logger.warning("%s", warning)
    write_text_atomically(run.config, config.to_toml())
    run.control.mkdir(exist_ok=True)
    run.begin(0, config.run.steps or 0)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Also write to log.txt what is logged inside the block."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _recorded_end(run: RunFolder) -> Iterator[None]:
    """Whatever ends the block early is written to state.json before it goes on its way."""
    try:
        yield
    except BaseException as error:
        message, hint = str(error) or type(error).__name__, ""
        if not isinstance(error, UserError | RunError):
            hint = "This is a fault of the program or the machine, not of the config. Run again with --debug."
        run.end("failed", Failure(type(error).__name__, message, hint))
        logger.error("%s: %s", type(error).__name__, message)
        raise


def _leave_behind(config: TrainConfig, run: RunFolder, trainer: Trainer, adapter: Path) -> None:
    """Loss plot, contact sheet and model card; then say where everything is."""
    metrics = latest_per_step(read_metrics(run.metrics))
    if metrics:
        loss_plot(metrics, run.path / LOSS_PLOT, title=config.run.name)
    has_sheet = trainer.previewer.draw_contact_sheet(run.path / CONTACT_SHEET)
    is_complete = trainer.step >= trainer.plan.steps
    write_model_card(
        run.model_card,
        adapter=adapter,
        base=config.model.path,
        trigger_example=config.preview.prompts[0] if config.preview.prompts else "your prompt",
        rank=config.adapter.rank,
        steps=trainer.step,
    )
    run.end("finished" if is_complete else "stopped")
    if not is_complete:
        logger.info(
            "Stopped (%s) at step %d of %d; everything is saved. Continue with --resume.",
            trainer.stop.reason, trainer.step, trainer.plan.steps,
        )  # fmt: skip
    logger.info("adapter            %s", adapter)
    if has_sheet:
        logger.info("before and after   %s", run.path / CONTACT_SHEET)
    if metrics:
        logger.info("loss               %s", run.path / LOSS_PLOT)
