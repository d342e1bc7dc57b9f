"""A sweep in its members' folders: every member is a run like any other, and all are trained together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_diffusion.adapters.inject import eject, join
from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.config import TrainConfig
from lora_diffusion.config_sweep import Member, check_together
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.jobs.device_lock import NoLongerWanted, shared_device
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.precision import resolve_precision
from lora_diffusion.progress import bar
from lora_diffusion.recipe import build_on, make_accelerator
from lora_diffusion.recipe_base import load_base, release_unused
from lora_diffusion.recipe_data import SharedBase
from lora_diffusion.runs import RunFolder, RunState
from lora_diffusion.sweep_pictures import draw_contact_sheet, draw_losses
from lora_diffusion.training.joint import JointTrainer
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training_run import (
    before_first_step,
    begin_recorded,
    compiler_if_wanted,
    end_untrained,
    leave_behind,
    recorded,
)

logger = logging.getLogger(__name__)

_speaker: ContextVar[str] = ContextVar("speaker", default="")
"""The name of the member whose business is being done; "" while it is everybody's."""


@dataclass
class _Run:
    """A member and what is open for it."""

    member: Member
    folder: RunFolder
    resumes: bool
    error: BaseException | None = None
    is_over: bool = False
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        return self.member.name

    def open(self) -> None:
        """Move an earlier run aside, start the log, say in state.json that the run is on."""

        def hears(_: logging.LogRecord) -> bool:
            return _speaker.get() in ("", self.name)

        self._open.enter_context(recorded(self.member.config, self.folder, resume=self.resumes, hears=hears))

    def close(self, error: BaseException | None = None) -> None:
        """error: what ended the run; it is written to its log and its state."""
        self.error, self.is_over = error, True
        try:
            self._open.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except (RunError, UserError) as told:
            self.error = told

    def give_up(self) -> None:
        """Before the first step: nothing was trained."""
        if not self.is_over:
            with _speaking(self.name):
                end_untrained(self.folder)
                self.close()


def run_sweep(members: Sequence[Member], folder: Path, *, resume: bool) -> None:
    """Train all members, each in its run folder; put the pictures that compare them into `folder`.

    resume: go on with what an earlier sweep left; finished members stay as they are, those that made no checkpoint
    start anew. Raises UserError before anything is trained if a member cannot be; RunError at the end if some failed.
    """
    check_together(members)
    accelerator = make_accelerator(members[0].config)
    if accelerator.num_processes > 1:
        raise UserError("A sweep trains in one process, and several were started. Use lora-diffusion sweep by itself.")
    runs = _wanted(members, resume=resume)
    with ExitStack() as locks, _named_on_terminal():
        for run in runs:
            with _blamed(run.member):
                locks.enter_context(run.folder.lock())
                run.folder.check_start(resume=run.resumes)
        if runs:
            with compiler_if_wanted(members[0].config, accelerator):
                _train(runs)
    try:
        draw_contact_sheet(members, folder)
        draw_losses(members, folder)
    except Exception as error:  # all runs have ended, and these can be done without
        logger.warning("%s: contact sheet and loss plot cannot be written (%s)", folder, _in_words(error))
    if failed := [run for run in runs if run.error is not None]:
        reasons = "".join(f"\n  {run.name}: {_in_words(run.error)}" for run in failed)
        raise RunError(
            f"{len(failed)} of {len(runs)} runs of the sweep failed, the others were trained:{reasons}"
        ) from failed[0].error


def _in_words(error: BaseException | None) -> str:
    """A fault tells its class: its text alone, as that of a KeyError, may say nothing."""
    return str(error) if isinstance(error, RunError | UserError | OSError) else f"{type(error).__name__}: {error}"


def _wanted(members: Sequence[Member], *, resume: bool) -> list[_Run]:
    """The members that are to be trained now."""
    runs: list[_Run] = []
    for member in members:
        folder = RunFolder(member.config.run.output)
        state = folder.read_state() if resume else None
        if state is not None and state.status == "finished" and not _is_longer(member.config, folder, state):
            logger.info("%s: finished already.", member.name)
        else:
            runs.append(_Run(member, folder, resumes=resume and folder.has_checkpoint))
    if resume and len(runs) == len(members) and not any(run.resumes for run in runs):
        raise UserError("--resume: no run of this sweep has a checkpoint. Start without --resume.")
    return runs


def _is_longer(config: TrainConfig, folder: RunFolder, state: RunState) -> bool:
    """Whether a finished run is to go on. In epochs that is known without its pictures by what it was asked before."""
    if config.run.steps is not None:
        return config.run.steps > state.step
    try:
        return config.run.epochs != TrainConfig.load(folder.config).run.epochs
    except UserError:  # gone, or of another version: what is finished after all ends at once
        return True


def _train(runs: Sequence[_Run]) -> None:
    config = runs[0].member.config
    try:
        for run in runs:
            with _speaking(run.name), _blamed(run.member):
                run.open()
        with ExitStack() as held:
            with before_first_step():
                held.enter_context(_device(runs, make_accelerator(config).device))
                wanted = [run for run in runs if not run.is_over]
                layout = JointLayout()
                trainers = _build(wanted, layout)
            _train_together(wanted, trainers, layout)
    except NoLongerWanted:
        for run in runs:
            run.give_up()
    except BaseException as error:  # of the whole sweep: every member that is left says so
        left = [run for run in runs if not run.is_over]
        for run in left:
            run.close(error)
        told = next((run.error for run in left if run.error is not error), None)
        if told is not None:  # out of memory, said so that one can act on it
            raise RunError(f"{told} Or put fewer runs into the sweep.") from error
        raise


@contextmanager
def _device(runs: Sequence[_Run], device: torch.device) -> Iterator[None]:
    """Hold the device if whoever started this process wants that. A run that is stopped while waiting for it ends."""

    def should_stop() -> bool:
        for run in runs:
            if "stop" in run.folder.take_control():
                run.give_up()
        return all(run.is_over for run in runs)

    what = f"a sweep of {len(runs)} runs, the first {runs[0].name}"
    with shared_device(device.type, device.index, what, should_stop):
        yield


def _train_together(runs: Sequence[_Run], trainers: Sequence[Trainer], layout: JointLayout) -> None:
    def speaking(number: int) -> AbstractContextManager[None]:
        return _speaking(runs[number].name)

    def on_end(number: int, adapter: Path) -> None:
        leave_behind(runs[number].member.config, trainers[number], adapter)
        runs[number].close()

    def on_failure(number: int, error: Exception) -> None:
        runs[number].close(error)
        logger.error("%s The other runs go on.", _in_words(runs[number].error))

    together = JointTrainer(trainers, layout, speaking, on_end, on_failure)
    with together.stop.listen():
        together.fit()


def _build(runs: Sequence[_Run], layout: JointLayout) -> list[Trainer]:
    """A trainer for each member on one base, with the adapters of all around its layers."""
    config = runs[0].member.config
    accelerators = [make_accelerator(run.member.config) for run in runs]  # each with a loss scaler of its own
    device = accelerators[0].device
    model = load_base(config, resolve_precision(config.run.precision, device), device, bar)
    base = SharedBase(model, len(runs))
    trainers: list[Trainer] = []
    for run, accelerator in zip(runs, accelerators, strict=True):
        with _speaking(run.name), _blamed(run.member):
            options = {"resume": run.resumes, "is_shared": True}
            trainer = build_on(base, run.member.config, run.folder, accelerator, **options, track=bar)
        for part, adapters in trainer.exporter.adapters.items():
            eject(model.parts[part].module, adapters)
        trainers.append(trainer)
    release_unused([run.member.config for run in runs], model)
    _join(model, trainers, layout)
    for run, trainer in zip(runs, trainers, strict=True):
        begin_recorded(run.member.config, trainer)
    logger.info("%d runs are trained together on one base.", len(runs))
    return trainers


def _join(model: DiffusionModel, trainers: Sequence[Trainer], layout: JointLayout) -> None:
    for part, component in model.parts.items():
        join(component.module, [trainer.exporter.adapters.get(part, {}) for trainer in trainers], layout)


@contextmanager
def _blamed(member: Member) -> Iterator[None]:
    """An input error of one member says whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from error


@contextmanager
def _speaking(name: str) -> Iterator[None]:
    token = _speaker.set(name)
    try:
        yield
    finally:
        _speaker.reset(token)


class _Named(logging.Formatter):
    """Puts the member's name before what it says."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        return f"{name}: {text}" if (name := _speaker.get()) else text


@contextmanager
def _named_on_terminal() -> Iterator[None]:
    """Where all members speak at once, each line says whose it is. Their own log files need no names."""
    handlers = logging.getLogger().handlers[:]
    earlier = [handler.formatter for handler in handlers]
    for handler, formatter in zip(handlers, earlier, strict=True):
        handler.setFormatter(_Named(formatter))
    try:
        yield
    finally:
        for handler, formatter in zip(handlers, earlier, strict=True):
            handler.setFormatter(formatter)
