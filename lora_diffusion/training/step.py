"""The one module that accelerate wraps: a batch goes in, a loss per sample comes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_diffusion.data.cache import TextCache
from lora_diffusion.diffusion.loss import LOSS_WEIGHTS, per_sample_loss
from lora_diffusion.models.base import Conditioning, DiffusionModel
from lora_diffusion.training.batches import Batch


class DenoisingLoss(nn.Module):
    """Noise the latents, let the model predict, compare with the target, weight by timestep.

    loss: a name in `LOSSES`. weighting: a name in `LOSS_WEIGHTS`, `gamma` its parameter.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        loss: str = "mse",
        weighting: str = "none",
        gamma: float = 5.0,
        clip_skip: int = 1,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.weigh = LOSS_WEIGHTS[weighting]
        self.gamma = gamma
        self.clip_skip = clip_skip
        self.chunks = chunks

    def forward(self, batch: Batch, text: Conditioning | None = None) -> Tensor:
        """Weighted loss of each sample: (B,), float32.

        text: the captions' encoding where it is cached; None encodes them here, so that gradients
        reach the text encoder's adapter.
        """
        if text is None:
            text = self.encode(batch.captions)
        prediction = self.model.predict(self.noisy(batch), batch.timesteps, text.with_size(batch.sizes))
        return self.compare(batch, prediction)

    def noisy(self, batch: Batch) -> Tensor:
        """What the model is shown: (B, C, H, W)."""
        return self.model.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)

    def compare(self, batch: Batch, prediction: Tensor) -> Tensor:
        """Weighted loss of each sample, (B,), float32, of what the model predicted for `noisy(batch)`."""
        schedule = self.model.schedule
        target = schedule.target(batch.latents, batch.noise, batch.timesteps)
        losses = per_sample_loss(prediction.float(), target.float(), self.loss)  # (B, C, H, W) → (B,)
        return losses * self.weigh(schedule.snr(batch.timesteps), schedule.prediction, self.gamma)

    def encode(self, captions: tuple[str, ...]) -> Conditioning:
        return self.model.encode_text(captions, clip_skip=self.clip_skip, chunks=self.chunks)


def cached_text(cache: TextCache, captions: Sequence[str], device: torch.device) -> Conditioning:
    """The conditioning of a batch of captions, from the cache."""
    entries = [cache.get(caption) for caption in captions]
    return Conditioning(**{name: torch.stack([entry[name] for entry in entries]).to(device) for name in entries[0]})


def train_only_adapters(model: nn.Module, adapter_parameters: list[nn.Parameter]) -> None:
    """Freeze everything in `model` except `adapter_parameters`, which are made to need gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter_parameters:
        if parameter.dtype != torch.float32:
            raise AssertionError(f"adapter weights are trained in float32, not {parameter.dtype}")
        parameter.requires_grad_(True)
