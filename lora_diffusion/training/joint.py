"""Several trainings on one frozen base: they share the base's forward and backward pass and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.signals import StopRequest
from lora_diffusion.training.step import DenoisingLoss
from lora_diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One training's micro-batch in a common forward pass. number: of the training in the layout."""

    number: int
    loss: DenoisingLoss
    batch: Batch
    text: Conditioning

    @property
    def shapes(self) -> tuple[object, ...]:
        """Micro-batches of equal shapes fit into one pass."""
        pooled = None if self.text.pooled is None else self.text.pooled.shape[1:]
        return (self.batch.latents.shape[1:], self.text.hidden.shape[1:], pooled)


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

    def fit(self) -> None:
        """Train every member to its last step, or until it or all are asked to stop."""
        self.begin()
        with self.stop.listen():
            while self._active:
                self._let_go()
                if self._active:
                    self.train_step()

    def begin(self) -> None:
        """What comes before the first step, for every member."""
        self._active = dict(enumerate(self.members))
        for number, trainer in self._now():
            self._alone(number, trainer.begin)

    def _alone(self, number: int, action: Callable[[], T]) -> T | None:
        """Do one member's own work: the model then holds its adapter alone, and an error ends this member only."""
        with self.layout.only(number), self.speaking(number):
            try:
                return action()
            except (RunError, UserError, OSError) as error:
                self._active.pop(number, None)
                self.on_failure(number, error)
                return None

    def _let_go(self) -> None:
        """Members that are over leave."""
        for number, trainer in self._now():
            trainer.stop.reason = trainer.stop.reason or self.stop.reason
            if trainer.is_over():
                self._alone(number, lambda n=number, t=trainer: self.on_end(n, t.finish()))
                self._active.pop(number, None)

    def train_step(self) -> None:
        """One optimiser step of every member. Those with more micro-batches go on when the others have theirs."""
        started = time.perf_counter()
        drawn = {number: self._alone(number, trainer.next_micro_batches) for number, trainer in self._now()}
        batches = {number: found for number, found in drawn.items() if found is not None}
        totals = {number: torch.zeros((), device=batches[number][0].latents.device) for number in batches}
        for index in range(max((len(found) for found in batches.values()), default=0)):
            present = [number for number in batches if number in self._active and index < len(batches[number])]
            shares = [share for number in present if (share := self._share(number, index, batches[number][index]))]
            for group in _of_equal_shapes(shares):
                for share, loss in zip(group, self._backward(group, index), strict=True):
                    totals[share.number] += loss
        made = {n: self._alone(n, lambda t=t, n=n: t.update(totals[n], batches[n])) for n, t in self._now()}
        seconds = time.perf_counter() - started
        for number, trainer in self._now():
            if values := made[number]:
                self._alone(number, lambda t=trainer, values=values: t.end_step(values, seconds))

    def _now(self) -> list[tuple[int, Trainer]]:
        return list(self._active.items())

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
            stack.enter_context(self.layout.divided([(s.number, len(s.batch.latents)) for s in group]))
            for trainer in trainers:
                stack.enter_context(trainer.dropout(index))
            with trainers[0].accelerator.autocast():  # as accelerate wraps the loss of a training alone
                losses = joint_losses(group)
            parts = [(values * share.batch.weights).sum() for share, values in zip(group, losses, strict=True)]
            scaled = [trainer.scaled(part) for trainer, part in zip(trainers, parts, strict=True)]
            torch.stack(scaled).sum().backward()
        return [part.detach() for part in parts]


def joint_losses(shares: Sequence[Share]) -> list[Tensor]:
    """The weighted losses of each share's samples, (B,) float32, from one forward pass over all of them."""
    noisy = torch.cat([share.loss.noisy(share.batch) for share in shares])
    timesteps = torch.cat([share.batch.timesteps for share in shares])
    conditioning = Conditioning.cat([share.text.with_size(share.batch.sizes) for share in shares])
    prediction = shares[0].loss.model.predict(noisy, timesteps, conditioning)
    parts = prediction.split([len(share.batch.latents) for share in shares])
    return [share.loss.compare(share.batch, part) for share, part in zip(shares, parts, strict=True)]


def _of_equal_shapes(shares: Sequence[Share]) -> list[list[Share]]:
    groups: dict[tuple[object, ...], list[Share]] = {}
    for share in shares:
        groups.setdefault(share.shapes, []).append(share)
    return list(groups.values())
