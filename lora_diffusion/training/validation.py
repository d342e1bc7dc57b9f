"""Validation loss on pictures that training never sees, with the same noise every time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.data.cache import LatentCache
from lora_diffusion.data.folder import Sample
from lora_diffusion.generation.engine import Cancelled
from lora_diffusion.models.base import Conditioning
from lora_diffusion.streams import stream, stream_seed
from lora_diffusion.training.batches import Batch, sample_sizes
from lora_diffusion.training.previews import OnStep
from lora_diffusion.training.step import DenoisingLoss

logger = logging.getLogger(__name__)

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
    """Mean loss over held-out pictures at fixed timesteps with fixed noise. Draws nothing from training's streams.

    rows: computed at once, at most. The value depends on it by rounding only.
    """

    samples: Sequence[Sample]
    latents: LatentCache
    encode: Callable[[Sequence[str]], Conditioning]
    seed: int
    rows: int = NUM_TIMESTEPS

    def measure_in_training(
        self, step: int, loss: DenoisingLoss, device: torch.device, on_step: OnStep
    ) -> dict[str, float]:
        """What the metrics say of it; nothing where `on_step` raises Cancelled."""
        try:
            return {"val_loss": self.measure(loss, device, on_step)}
        except Cancelled:
            logger.info("step %d: the validation is left out, as the run is to stop", step)
            return {}

    def measure(self, loss: DenoisingLoss, device: torch.device, on_step: OnStep | None = None) -> float:
        """The unweighted-by-step mean of `loss` over every picture and timestep.

        The model is in evaluation mode while it trains, too, and adapters drop nothing outside of steps.

        on_step: called with (pictures done, all of them) before rows are computed; an exception from it, such as
        `Cancelled`, ends the measuring.
        """
        values: list[Tensor] = []
        with torch.no_grad():
            for number, sample in enumerate(self.samples):
                losses: list[Tensor] = []
                for batch in self._batches(sample, loss.model.schedule.num_steps):
                    if on_step is not None:
                        on_step(number, len(self.samples))
                    losses.append(loss(batch.to(device), self.encode(batch.captions)))
                values.append(torch.cat(losses).mean())
        return float(torch.stack(values).mean())

    def _batches(self, sample: Sample, num_steps: int) -> Iterator[Batch]:
        mean, _ = self.latents.get(sample)
        timesteps = [(2 * i + 1) * num_steps // (2 * NUM_TIMESTEPS) for i in range(NUM_TIMESTEPS)]
        for start in range(0, NUM_TIMESTEPS, self.rows):
            part = timesteps[start : start + self.rows]
            streams = [stream(self.seed, "validation-noise", sample.id, t) for t in part]
            yield Batch(
                latents=mean.expand(len(part), *mean.shape).clone(),
                noise=torch.stack([torch.randn(mean.shape, generator=generator) for generator in streams]),
                timesteps=torch.tensor(part),
                weights=torch.full((len(part),), 1 / NUM_TIMESTEPS),
                sizes=sample_sizes(sample).expand(len(part), 6),
                captions=(sample.caption,) * len(part),
                names=(sample.image.name,) * len(part),
            )
