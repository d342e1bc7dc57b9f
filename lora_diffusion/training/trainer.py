"""The training loop, readable from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.data.cache import TextCache
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.generation.engine import Cancelled
from lora_diffusion.models.base import Conditioning
from lora_diffusion.runs import Control, RunFolder
from lora_diffusion.training.batches import Batch, BatchSource, LoadedBatches
from lora_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from lora_diffusion.training.export import Exporter
from lora_diffusion.training.heartbeat import kept_alive
from lora_diffusion.training.optimizers import drop_ended_gradients, part_has_ended, set_learning_rate
from lora_diffusion.training.plan import Plan
from lora_diffusion.training.previews import Previewer
from lora_diffusion.training.quiet_step import QuietLoop, QuietMember, QuietStep, ResidentTexts
from lora_diffusion.training.regularise import Regulariser
from lora_diffusion.training.signals import StopRequest
from lora_diffusion.training.step import DenoisingLoss, cached_text
from lora_diffusion.training.tracking import Console, Dispensable, MetricsFile, not_finite
from lora_diffusion.training.validation import Validator

logger = logging.getLogger(__name__)

_HEARTBEAT_EVERY_S = 2.0
_STEPS_AHEAD = 4  # that are launched before their values are known; more would gain nothing
_MAX_NOT_FINITE = 20  # steps in a row; halved so often, fp16's loss scale of 2**16 is below 1 and no longer the cause
_RESIDENT_TEXT_BYTES = 2**30  # of embeddings on a GPU; 4,500 captions of SD 1.x


@dataclass
class Trainer:
    """Trains the adapters of `loss.model`; everything it needs is handed in by the recipe.

    text: the cached encodings, or None when the text encoder is trained and encodes inside the step.
    facts: JSON values kept with each checkpoint, to recognise another config or data set on resume.
    """

    accelerator: Accelerator
    loss: DenoisingLoss
    source: BatchSource
    text: TextCache | None
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate_curve: Callable[[int], float]
    plan: Plan
    run: RunFolder
    exporter: Exporter
    regulariser: Regulariser
    previewer: Previewer
    validator: Validator | None
    facts: dict[str, Any]
    name: str
    step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    _wrapped: nn.Module = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)
    _metrics: MetricsFile = field(init=False)
    _console: Console = field(init=False)
    _batches: LoadedBatches | None = field(default=None, init=False)
    _quiet: QuietLoop | None = field(default=None, init=False)
    _quiet_step: QuietStep | None = field(default=None, init=False)
    _seconds_per_step: float = field(default=0.0, init=False)
    _saved_step: int = field(default=-1, init=False)
    _saved_after: Exception | None = field(default=None, init=False)
    _heartbeat: float = field(default=0.0, init=False)
    _num_owed: int = field(default=0, init=False)
    _num_not_finite: int = field(default=0, init=False)
    _dispensable: Dispensable = field(default_factory=Dispensable, init=False)

    def fit(self) -> Path:
        """Train from the current step to the last, or until `stop` is asked for; save; return the adapter file.

        Raises RunError when the loss or a gradient is not finite. Whatever ends a step before its update, the weights
        of the last good step are saved.
        """
        self.begin()
        try:
            alive = kept_alive(self._beat) if self.plan.compiles else nullcontext()
            with self._console.open(self.step), alive:
                while not self.is_over():
                    self.train_step()
                self._settle()
        finally:
            self.end_steps()
        return self.finish()

    def begin(self) -> None:
        """What comes before the first step."""
        self.loss.to(self.accelerator.device)
        self._wrapped = self.accelerator.prepare_model(self.loss)
        self._optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self._metrics = MetricsFile(self.run.metrics)
        self._console = Console(self.plan.steps, self.accelerator.device, self.accelerator.is_main_process)
        self._saved_step = self.step
        if self.step == 0:
            self._draw_previews()
        first, last = self.step * self.plan.accumulation, self.plan.steps * self.plan.accumulation
        self._batches = LoadedBatches(self.source, first, last, self.plan.loader_workers)

    def is_over(self) -> bool:
        return self.step >= self.plan.steps or self._should_stop()

    # One step

    def train_step(self) -> None:
        """One optimiser step, and what is due after it."""
        started = time.perf_counter()
        if self.plan.launch == "eager":
            with self.kept_on_error():
                micro_batches = self.next_micro_batches()
                total = self._losses_of(micro_batches)
            values = self.update(total, micro_batches)
            self.end_step(values, time.perf_counter() - started)
        else:
            self._train_quietly(started)
        self.save_if_due()
        self.do_what_is_due()

    def next_micro_batches(self) -> list[Batch]:
        """Those of the next optimiser step, on the device, in the order of their backward passes."""
        assert self._batches is not None
        return [next(self._batches).to(self.accelerator.device) for _ in range(self.plan.accumulation)]

    def _losses_of(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Forward and backward of one optimiser step; returns its loss."""
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            # Gradients of several processes are averaged once, with the last micro-batch.
            with nullcontext() if is_last else self.accelerator.no_sync(self._wrapped), self.dropout(index):
                losses: Tensor = self._wrapped(batch, self.conditioning(batch.captions))  # (B,)
                loss = (losses * batch.weights).sum()
                self.scaled(loss).backward()
                total += loss.detach()
        return total

    def dropout(self, index: int) -> AbstractContextManager[None]:
        """Inside, adapters drop what the micro-batch `index` of the present step makes them drop."""
        micro_step = self.step * self.plan.accumulation + index
        return self.regulariser.dropout(micro_step, self.accelerator.process_index)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as it goes into backward: fp16 gradients would vanish without a factor, which the update undoes."""
        scaler = self.accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def update(self, total: Tensor, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Clip the gradients that are there, and step; returns what metrics.jsonl records.

        total: the loss, summed over the micro-batches.
        """
        set_learning_rate(self.optimizer, self.learning_rate_curve(self.step), self.step)
        lr = self.optimizer.param_groups[0]["lr"]
        loss = float(self.accelerator.reduce(total, "mean"))  # pyright: ignore[reportArgumentType]
        self._check_finite(loss, "loss", lr, micro_batches)
        drop_ended_gradients(self.optimizer, self.step)
        limit = self.plan.max_grad_norm or math.inf  # 0 only measures
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, limit) or 0.0)
        self._num_not_finite = 0 if math.isfinite(grad_norm) else self._num_not_finite + 1
        # The loss scaler of fp16 handles overflowing gradients itself: it skips the update and lowers the scale.
        if self.accelerator.scaler is None or self._num_not_finite > _MAX_NOT_FINITE:
            self._check_finite(grad_norm, "gradient norm", lr, micro_batches)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        num_limited = self.regulariser.limit_norms()
        self.step += 1
        values: dict[str, float] = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        return values if num_limited is None else values | {"norms_limited": num_limited}

    def _train_quietly(self, started: float) -> None:
        """The same step, of which the host learns later how it went."""
        if self._quiet_step is None:
            members, device = {0: self.start_quietly()}, self.accelerator.device
            self._quiet_step = QuietStep(members, JointLayout(), device, as_graph=self.plan.launch == "graph")
        with self.kept_on_error():  # the update comes last and takes no memory
            self._quiet_step({0: self.next_inputs()})
        self.end_launch(started)
        self.validate_if_due()

    def start_quietly(self, num_beside: int = 0) -> QuietMember:
        """Its part of steps that are launched with `next_inputs`, after each of which `end_launch` is called.

        num_beside: other trainings with which the device's memory for texts is shared.
        """
        assert self.text is not None, "a text encoder that is trained encodes inside the step"
        assert self._batches is not None
        adapters = [adapter for by_path in self.exporter.adapters.values() for adapter in by_path.values()]
        member = QuietMember(self.loss, adapters, self.optimizer, self.parameters, self.plan.max_grad_norm)
        texts = ResidentTexts(self.text.get, self.accelerator.device, _RESIDENT_TEXT_BYTES // (1 + num_beside))
        self._quiet = QuietLoop(member, self._batches, self.plan.accumulation, texts)
        return member

    def next_inputs(self) -> dict[str, Tensor]:
        assert self._quiet is not None
        factor = self.learning_rate_curve(self.step)
        return self._quiet.next_inputs([group["peak_lr"] * factor for group in self.optimizer.param_groups])

    def end_launch(self, started: float) -> None:
        """What is told and measured after a step was launched. started: when its making began."""
        assert self._quiet is not None
        self._quiet.launched()
        self.step += 1
        self._num_owed += 1
        if not self._seconds_per_step:
            self._measure_speed(time.perf_counter() - started)  # the first line wants a number, too
        if self._is_to_validate():
            self._quiet.wait()  # the line of this step is to have the value
        else:
            self._settle(_STEPS_AHEAD)
        self._measure_speed(time.perf_counter() - started)

    def validate_if_due(self) -> None:
        """After `end_launch`, so that its time does not count as the step's."""
        if self._is_to_validate():
            self._settle(0, self._validate())

    def end_steps(self) -> None:
        """No further step is made; the thread and the processes that make batches end."""
        if self._quiet is not None:
            self._quiet.close()
            self._quiet = self._quiet_step = None
        if self._batches is not None:
            self._batches.close()

    def _settle(self, owed: int = 0, last: dict[str, float] | None = None) -> None:
        """Log the steps whose values have arrived; wait until at most `owed` are missing. Nothing is kept before.

        last: more for the line of the last step. Raises RunError as `fit` does, back at the last good step.
        """
        if self._quiet is None:
            return
        for reading in self._quiet.readings(owed=owed):
            step = self.step - self._num_owed + 1
            self._num_owed -= 1
            for value, what in ((reading.loss, "loss"), (reading.grad_norm, "gradient norm")):
                if not math.isfinite(value):
                    self.step = step - 1  # nothing has been changed since
                    self.end_steps()
                    self._check_finite(value, what, reading.lr, reading.batches)
            values = {"loss": reading.loss, "lr": reading.lr, "grad_norm": reading.grad_norm}
            self._log(step, values | (last or {}) if step == self.step else values)

    def conditioning(self, captions: Sequence[str]) -> Conditioning | None:
        """The captions' encoding; None where it is trained, and so belongs into the step."""
        if self.text is None:
            return self._fixed_text(captions)
        return cached_text(self.text, captions, self.accelerator.device)

    def _fixed_text(self, captions: Sequence[str]) -> Conditioning | None:
        """The encoding by text encoders whose training is over, without gradients; None while it goes on.

        Several processes go on without this saving: they expect a gradient from every parameter.
        """
        if self.accelerator.num_processes > 1 or not part_has_ended(self.optimizer, self.step):
            return None
        with torch.no_grad():
            return self.loss.encode(tuple(captions))

    def _check_finite(self, value: float, what: str, lr: float, micro_batches: Sequence[Batch]) -> None:
        if math.isfinite(value):
            return
        # The update has not been made: the weights are those of the last good step.
        unsaved = self._save_or_error()
        self._saved_after = not_finite(value, what, self.step, lr, micro_batches, self.run.checkpoints, unsaved)
        raise self._saved_after

    # Between steps

    def end_step(self, values: dict[str, float], seconds: float) -> None:
        """What is told and measured after an update. values: what it returned. seconds: what the step took."""
        self._measure_speed(seconds)
        self._log(self.step, values | self._validate())

    def _is_to_validate(self) -> bool:
        return self.validator is not None and self.plan.is_due(self.plan.validate_every, self.step)

    def _validate(self) -> dict[str, float]:
        if self.validator is None or not self._is_to_validate():
            return {}
        with self.kept_on_error():
            return self.validator.measure_in_training(
                self.step, self.loss, self.accelerator.device, self._stay_reachable
            )

    def _log(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl where one is due, and what the terminal shows."""
        is_logged = "val_loss" in values or self.plan.is_due(self.plan.log_every, step)
        if is_logged and self.accelerator.is_main_process:
            epoch = round(step * self.plan.accumulation / self.source.batches.batches_per_epoch, 3)
            line = {"step": step, "epoch": epoch} | values | {"seconds": round(self._seconds_per_step, 4)}
            with self._dispensable:
                self._metrics.write(line)
        self._console.show(step, values["loss"], values["lr"], self._seconds_per_step)

    def save_if_due(self) -> None:
        self._beat()
        if self.step < self.plan.steps and self.plan.is_due(self.plan.save_every, self.step):
            self._save()

    def do_what_is_due(self) -> None:
        """Draw previews, obey control files: what is due is saved before. After the last step `draw_last` does this."""
        if self.step < self.plan.steps:
            if self.plan.is_due(self.plan.preview_every, self.step):
                self._draw_previews()
            self._obey_control_files()

    def _measure_speed(self, seconds: float) -> None:
        """Moving average over about ten steps: follows a machine that gets busy, ignores single hiccups."""
        self._seconds_per_step = seconds if not self._seconds_per_step else 0.9 * self._seconds_per_step + 0.1 * seconds

    def _beat(self) -> None:
        if time.monotonic() - self._heartbeat > _HEARTBEAT_EVERY_S and self.accelerator.is_main_process:
            self._heartbeat = time.monotonic()
            self._tell_state()

    def _tell_state(self) -> None:
        with self._dispensable:
            self.run.beat(self.step, self.plan.steps, self._seconds_per_step)

    def _obey_control_files(self, of: Collection[Control] = get_args(Control)) -> None:
        if not self.accelerator.is_main_process:
            return
        for command, content in self.run.take_control(of).items():
            if command == "stop":
                self.stop.reason = "control/stop"
            elif command == "save_now":
                self._save()
            elif command == "sample_now":
                self._draw_previews(content)

    def _should_stop(self) -> bool:
        """True on every process as soon as one was asked to stop, so that all leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop)
        flag = torch.tensor(float(bool(self.stop)), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0  # pyright: ignore[reportArgumentType]

    def _draw_previews(self, asked: Mapping[str, Any] | None = None) -> None:
        """The run's own prompts, or what `asked` says."""
        self._settle()
        if self.accelerator.is_main_process:
            self.previewer.draw_in_training(self.step, asked, self._stay_reachable)

    def _stay_reachable(self, done: int, total: int) -> None:
        """What takes minutes lets whoever watches see that the run is alive, and need not be waited for to stop it."""
        self._beat()
        self._obey_control_files(of=("stop",))
        if self.stop:
            raise Cancelled

    # Saving

    def checkpoint(self) -> Checkpoint:
        """The run's state at this step boundary."""
        scaler = self.accelerator.scaler
        facts = self.facts | {"scaler": scaler.state_dict() if scaler is not None else None}
        return Checkpoint(self.step, self.exporter.tensors(), self.optimizer.state_dict(), facts)

    def _save_checkpoint(self) -> None:
        self._settle()
        if self.accelerator.is_main_process:
            if self.step != self._saved_step:
                save_checkpoint(self.run.checkpoints, self.checkpoint(), keep=self.plan.keep_checkpoints)
                self._saved_step = self.step
            self._tell_state()

    def _save(self) -> None:
        """A checkpoint to resume from and an adapter file to use, of this step. What cannot be written ends nothing."""
        self._settle()  # a loss that is not finite does end the run
        try:
            self._save_checkpoint()
            if self.accelerator.is_main_process:
                self.exporter.write(self.run.adapter(self.name, self.step), self.step)
        except (OSError, RunError, UserError) as error:
            logger.warning("step %d: not all could be saved (%s); training goes on to the next save", self.step, error)

    @contextmanager
    def kept_on_error(self) -> Generator[None]:
        """Inside are passes, which change no weight: if they fail, what the steps before have learned is saved."""
        try:
            yield
        except Exception as error:
            self.save_after(error)
            raise

    def save_after(self, error: Exception) -> None:
        """Save what was learned before `error`, once, which an error of the saving must not hide."""
        if error is self._saved_after:
            return  # on its way out of blocks within blocks
        self._saved_after = error
        if unsaved := self._save_or_error():
            logger.warning("%s after step %d; what was learned before cannot be saved: %s", error, self.step, unsaved)
        elif self.step:
            logger.info("%s after step %d, whose weights are saved.", type(error).__name__, self.step)

    def _save_or_error(self) -> Exception | None:
        try:
            self._save_checkpoint()
        except Exception as error:
            return error
        return None

    def finish(self) -> Path:
        """What comes after the last step that is made. Returns the adapter file."""
        adapter = self.save_last()
        self.draw_last()
        self.accelerator.wait_for_everyone()
        return adapter

    def save_last(self) -> Path:
        """Save what was reached. A run that was stopped keeps its step in the file name and can be resumed.

        The adapter is what one trains for, and small: it comes first, on a disk that may not hold a checkpoint, too.
        """
        self._settle()  # a loss that is not finite takes the run back
        is_complete = self.step >= self.plan.steps
        adapter = self.run.adapter(self.name, None if is_complete else self.step)
        if n := self._num_not_finite:
            logger.warning("The last %d steps changed nothing: their gradients were not finite in fp16.", n)
        if self.accelerator.is_main_process:
            with self.kept_on_error():
                self.exporter.write(adapter, self.step)
            self._tell_state()
        try:
            self._save_checkpoint()
        except (OSError, RunError, UserError) as error:
            raise RunError(f"{error} The adapter of step {self.step} is written: {adapter}.") from error
        return adapter

    def draw_last(self) -> None:
        """The last previews of a run that is complete, and what was asked for during its last step."""
        if self.step >= self.plan.steps:
            self._draw_previews()
            self._obey_control_files()
