"""Validation loss on pictures that training never sees, with the same noise every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.data.cache import LatentCache
from lora_diffusion.data.folder import Sample
from lora_diffusion.models.base import Conditioning
from lora_diffusion.streams import stream, stream_seed
from lora_diffusion.training.batches import Batch, sample_sizes
from lora_diffusion.training.step import DenoisingLoss

NUM_TIMESTEPS = 4
"""Timesteps per picture, spread evenly: the loss differs more between timesteps than between pictures."""


def split_validation(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): a picture is in exactly one of them with all its copies, whatever its repeats.

    The choice is a function of the picture's id and the seed, so adding a picture does not reshuffle the others.
    At least one picture is left on either side when `fraction` is above 0 and there are two.
    """
    num_pictures = len({sample.content for sample in samples})
    if fraction <= 0 or num_pictures < 2:
        return list(samples), []
    count = min(max(1, round(num_pictures * fraction)), num_pictures - 1)
    ranked = sorted(samples, key=lambda sample: stream_seed(seed, "validation", sample.id))
    held_out = set(list(dict.fromkeys(sample.content for sample in ranked))[:count])
    return [s for s in samples if s.content not in held_out], [s for s in samples if s.content in held_out]


@dataclass(frozen=True)
class Validator:
    """Mean loss over held-out pictures at fixed timesteps with fixed noise. Draws nothing from training's streams."""

    samples: Sequence[Sample]
    latents: LatentCache
    encode: Callable[[Sequence[str]], Conditioning]
    seed: int

    def measure(self, loss: DenoisingLoss, device: torch.device) -> float:
        """The unweighted-by-step mean of `loss` over every picture and timestep."""
        was_training = loss.training
        loss.eval()
        values: list[Tensor] = []
        with torch.no_grad():
            for sample in self.samples:
                batch = self._batch(sample, loss.model.schedule.num_steps).to(device)
                values.append(loss(batch, self.encode(batch.captions)).mean())
        loss.train(was_training)
        return float(torch.stack(values).mean())

    def _batch(self, sample: Sample, num_steps: int) -> Batch:
        mean, _ = self.latents.get(sample)
        timesteps = [(2 * i + 1) * num_steps // (2 * NUM_TIMESTEPS) for i in range(NUM_TIMESTEPS)]
        noise = [
            torch.randn(mean.shape, generator=stream(self.seed, "validation-noise", sample.id, t)) for t in timesteps
        ]
        return Batch(
            latents=mean.expand(NUM_TIMESTEPS, *mean.shape).clone(),
            noise=torch.stack(noise),
            timesteps=torch.tensor(timesteps),
            weights=torch.full((NUM_TIMESTEPS,), 1 / NUM_TIMESTEPS),
            sizes=sample_sizes(sample).expand(NUM_TIMESTEPS, 6),
            captions=(sample.caption,) * NUM_TIMESTEPS,
            names=(sample.image.name,) * NUM_TIMESTEPS,
        )
