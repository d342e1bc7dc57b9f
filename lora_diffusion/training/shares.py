"""Micro-batches of several trainings in one forward pass of the base they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.step import DenoisingLoss


@dataclass(frozen=True)
class Share:
    """One training's micro-batch in a common forward pass. number: of the training in the layout."""

    number: int
    loss: DenoisingLoss
    batch: Batch
    text: Conditioning

    @property
    def num_rows(self) -> int:
        return len(self.batch.latents)

    @property
    def shapes(self) -> tuple[object, ...]:
        """Micro-batches of equal shapes fit into one pass."""
        pooled = None if self.text.pooled is None else self.text.pooled.shape[1:]
        return (self.batch.latents.shape[1:], self.text.hidden.shape[1:], pooled)


def joint_losses(shares: Sequence[Share]) -> list[Tensor]:
    """The weighted losses of each share's samples, (B,) float32, from one forward pass over all of them."""
    if len(shares) == 1:
        return [share.loss(share.batch, share.text) for share in shares]
    noisy = torch.cat([share.loss.noisy(share.batch) for share in shares])
    timesteps = torch.cat([share.batch.timesteps for share in shares])
    conditioning = Conditioning.cat([share.text.with_size(share.batch.sizes) for share in shares])
    prediction = shares[0].loss.model.predict(noisy, timesteps, conditioning)
    parts = prediction.split([share.num_rows for share in shares])
    return [share.loss.compare(share.batch, part) for share, part in zip(shares, parts, strict=True)]


def of_equal_shapes(shares: Sequence[Share]) -> list[list[Share]]:
    """The shares of each pass."""
    groups: dict[tuple[object, ...], list[Share]] = {}
    for share in shares:
        groups.setdefault(share.shapes, []).append(share)
    return list(groups.values())
