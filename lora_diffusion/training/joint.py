"""Several trainings on one frozen base: they share the base's forward and backward pass and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import TypeVar

import torch
from torch import Tensor

from lora_diffusion.adapters.joint import JointLayout, JointTogether, can_join_together
from lora_diffusion.models.attention import projections_with_one_input
from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.quiet_step import QuietStep
from lora_diffusion.training.shares import Share, joint_losses, of_equal_shapes
from lora_diffusion.training.signals import StopRequest
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class JointTrainer:
    """Trains `members` step by step together; each clips, updates, logs, draws and saves as it would alone.

    A member's number is its place in `members` and in `layout`, which the model's joint layers share. A member that is
    finished, stopped or failed leaves, and the others go on.

    speaking: what happens inside is this member's business, not everybody's: for logs. on_end: called with a member
    and its adapter file once it has finished or was stopped. on_failure: with a member and the error that ended it.
    """

    members: Sequence[Trainer]
    layout: JointLayout
    speaking: Callable[[int], AbstractContextManager[None]]
    on_end: Callable[[int, Path], None]
    on_failure: Callable[[int, Exception], None]
    stop: StopRequest = field(default_factory=StopRequest)
    _active: dict[int, Trainer] = field(init=False)
    _is_quiet: bool = field(init=False)
    _quiet_step: QuietStep | None = field(default=None, init=False)

    def fit(self) -> None:
        """Train every member to its last step, or until it is asked to stop, or all are by `stop`."""
        try:
            self.begin()
            while self._active:
                self._let_go()
                if self._active:
                    self.train_step()
        finally:
            self.end()

    def begin(self) -> None:
        """What comes before the first step, for every member."""
        self._active = dict(enumerate(self.members))
        waiting = [trainer.name for trainer in self.members if trainer.plan.launch == "eager"]
        self._is_quiet = not waiting
        if 0 < len(waiting) < len(self.members):
            logger.info("All steps are launched one operation at a time, as those of %s must be.", ", ".join(waiting))
        for number, trainer in self._now():
            trainer.stop = StopRequest(self.stop)
            self._alone(number, trainer.begin, is_kept=False)

    def end(self) -> None:
        """No further step is made."""
        for _, trainer in self._now():
            trainer.end_steps()

    def _leave(self, number: int) -> None:
        self._active.pop(number, None)
        self.members[number].end_steps()

    def _alone(self, number: int, action: Callable[[], T], *, is_kept: bool = True) -> T | None:
        """Do one member's own work: the model then holds its adapter alone, and an error ends this member only.

        is_kept: what it has learned is saved after an error. Not for work that may leave weights changed in part.
        """
        with self.layout.only(number), self.speaking(number):
            try:
                with self.members[number].kept_on_error() if is_kept else nullcontext():
                    return action()
            except Exception as error:
                self._leave(number)
                self.on_failure(number, error)
                clear_frames(error.__traceback__)  # they may hold tensors, and the others need the memory
                return None

    def _let_go(self) -> None:
        """Members that are over leave: all are saved before one draws its last pictures."""
        over = [(number, trainer) for number, trainer in self._now() if trainer.is_over()]
        with self._kept_on_error():
            adapters = {number: self._alone(number, trainer.save_last, is_kept=False) for number, trainer in over}
            for number, trainer in over:
                if adapter := adapters[number]:
                    self._alone(number, partial(self._end, number, trainer, adapter))
                    self._leave(number)

    def _end(self, number: int, trainer: Trainer, adapter: Path) -> None:
        trainer.draw_last()
        self.on_end(number, adapter)

    def train_step(self) -> None:
        """One optimiser step of every member. Those with more micro-batches go on when the others have theirs."""
        started = time.perf_counter()
        if self._is_quiet:
            self._train_quietly(started)
            return
        with self._kept_on_error():
            batches = self._drawn(Trainer.next_micro_batches)
            totals = self._losses_of(batches)
        made = {n: self._alone(n, partial(t.update, totals[n], batches[n]), is_kept=False) for n, t in self._now()}
        seconds = time.perf_counter() - started
        with self._kept_on_error():
            for number, trainer in self._now():
                if values := made[number]:
                    self._alone(number, partial(trainer.end_step, values, seconds))
            self._do_what_is_due()

    def _train_quietly(self, started: float) -> None:
        """The same step, of which the host learns later how it went."""
        if self._quiet_step is None:
            self._quiet_step = self._start_quietly()
        with self._kept_on_error():  # the updates come last and take no memory
            if inputs := self._drawn(Trainer.next_inputs):
                self._quiet_step(inputs)
        with self._kept_on_error():
            for number, trainer in self._now():
                self._alone(number, partial(trainer.end_launch, started))
            for number, trainer in self._now():
                self._alone(number, trainer.validate_if_due)
            self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        """All are saved before one draws: a picture may take more memory than there is."""
        for number, trainer in self._now():
            self._alone(number, trainer.save_if_due)
        for number, trainer in self._now():
            self._alone(number, trainer.do_what_is_due)

    def _start_quietly(self) -> QuietStep:
        for layers in projections_with_one_input(self.members[0].loss):
            if can_join_together(layers):
                JointTogether(layers)
        num_beside = len(self._active) - 1
        members = {number: trainer.start_quietly(num_beside) for number, trainer in self._now()}
        as_graph = all(trainer.plan.launch == "graph" for trainer in self.members)
        return QuietStep(members, self.layout, self.members[0].accelerator.device, as_graph=as_graph)

    def _now(self) -> list[tuple[int, Trainer]]:
        return list(self._active.items())

    @contextmanager
    def _kept_on_error(self) -> Generator[None]:
        """What ends the step of all before its updates, or what is done between steps, costs no member its steps."""
        try:
            yield
        except Exception as error:
            for number, trainer in self._now():
                with self.speaking(number):
                    trainer.save_after(error)
            raise

    def _drawn(self, draw: Callable[[Trainer], T]) -> dict[int, T]:
        """For each member what it draws for its next step."""
        drawn = {number: self._alone(number, partial(draw, trainer)) for number, trainer in self._now()}
        return {number: found for number, found in drawn.items() if found is not None}

    def _losses_of(self, batches: Mapping[int, Sequence[Batch]]) -> dict[int, Tensor]:
        """Forward and backward passes of one step; returns each member's loss."""
        totals = {number: torch.zeros((), device=batches[number][0].latents.device) for number in batches}
        for index in range(max((len(found) for found in batches.values()), default=0)):
            present = [number for number in batches if number in self._active and index < len(batches[number])]
            shares = [share for number in present if (share := self._share(number, index, batches[number][index]))]
            for group in of_equal_shapes(shares):
                for share, loss in zip(group, self._backward(group, index), strict=True):
                    totals[share.number] += loss
        return totals

    def _share(self, number: int, index: int, batch: Batch) -> Share | None:
        """A text encoder that is trained encodes here, with one member's adapter; only the UNet is shared."""
        trainer = self.members[number]

        def encode() -> Conditioning:
            with trainer.dropout(index):
                text = trainer.conditioning(batch.captions)
                return trainer.loss.encode(batch.captions) if text is None else text

        text = self._alone(number, encode)
        return None if text is None else Share(number, trainer.loss, batch, text)

    def _backward(self, group: Sequence[Share], index: int) -> list[Tensor]:
        """Adds to the gradients of the group's members; returns each one's part of its loss, detached."""
        trainers = [self.members[share.number] for share in group]
        with ExitStack() as stack:
            stack.enter_context(self.layout.divided([(s.number, s.num_rows) for s in group]))
            for trainer in trainers:
                stack.enter_context(trainer.dropout(index))
            with trainers[0].accelerator.autocast():  # as accelerate wraps the loss of a training alone
                losses = joint_losses(group)
            parts = [(values * share.batch.weights).sum() for share, values in zip(group, losses, strict=True)]
            scaled = [trainer.scaled(part) for trainer, part in zip(trainers, parts, strict=True)]
            torch.stack(scaled).sum().backward()
        return [part.detach() for part in parts]
