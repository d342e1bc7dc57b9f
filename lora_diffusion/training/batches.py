"""From cached latents to training batches. Every draw is a pure function of (seed, epoch, sample, repeat)."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lora_diffusion.data.batches import BatchList, Draw
from lora_diffusion.data.cache import LatentCache
from lora_diffusion.data.captions import CaptionOptions, vary_caption
from lora_diffusion.data.folder import Sample
from lora_diffusion.diffusion.noise import draw_noise
from lora_diffusion.diffusion.schedule import sample_timestep
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.models.base import size_numbers
from lora_diffusion.streams import stream, stream_seed
from lora_diffusion.training.signals import STOP_SIGNALS


@dataclass(frozen=True)
class Batch:
    """One process's part of one micro-batch, drawn on the CPU.

    latents, noise: (B, C, H, W), float32, scaled latents. timesteps: (B,), integers.
    weights: (B,), each sample's share of the optimiser step's loss (0 for padding).
    sizes: (B, 6), float32, the pictures' `size_numbers`.
    names: the images' file names, for messages.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    sizes: Tensor
    captions: tuple[str, ...]
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            weights=self.weights.to(device),
            sizes=self.sizes.to(device),
        )


@dataclass(frozen=True)
class DrawOptions:
    """How noise and timesteps are drawn. `timesteps`: half-open range [low, high)."""

    timesteps: tuple[int, int]
    noise_offset: float = 0.0


@dataclass(frozen=True)
class SourceOptions:
    """What one data set table asks of its captions and pictures."""

    captions: CaptionOptions = field(default_factory=CaptionOptions)
    flip: bool = False


@dataclass(frozen=True)
class Share:
    """Which part of the global batches this process trains, and how many make an optimiser step."""

    rank: int = 0
    world: int = 1
    accumulation: int = 1


class BatchSource(Dataset[Batch]):
    """`source[i]` is this process's part of micro-batch `i`, counted from the first step of the run.

    The same index gives the same batch in any process, with any number of loader workers and after any resume:
    nothing is remembered between calls and no global random generator is drawn from.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sources: Sequence[SourceOptions],
        batches: BatchList,
        latents: LatentCache,
        draw: DrawOptions,
        share: Share,
    ) -> None:
        self.samples = samples
        self.sources = sources
        self.batches = batches
        self.latents = latents
        self.draw = draw
        self.share = share

    @property
    def seed(self) -> int:
        return self.batches.seed

    def __getitem__(self, index: int) -> Batch:
        draws = self.batches.share(index, self.share.rank, self.share.world)
        per_sample = self.share.world / self._num_samples_in_step(index)
        latents = [self._latents(draw) for draw in draws]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([self._noise(draw, x.shape) for draw, x in zip(draws, latents, strict=True)]),
            timesteps=torch.tensor([self._timestep(draw) for draw in draws]),
            weights=torch.tensor([draw.weight * per_sample for draw in draws], dtype=torch.float32),
            sizes=torch.stack([sample_sizes(self.samples[draw.sample], self._is_flipped(draw)) for draw in draws]),
            captions=tuple(self.caption(draw) for draw in draws),
            names=tuple(self.samples[draw.sample].image.name for draw in draws),
        )

    def caption(self, draw: Draw) -> str:
        sample = self.samples[draw.sample]
        generator = random.Random(stream_seed(self.seed, "caption", draw.epoch, sample.id, draw.repeat))
        return vary_caption(sample.caption, self.sources[sample.source].captions, generator)

    def _num_samples_in_step(self, index: int) -> int:
        first = index - index % self.share.accumulation
        return sum(len(self.batches.batch(i)) for i in range(first, first + self.share.accumulation))

    def _stream(self, purpose: str, draw: Draw) -> torch.Generator:
        return stream(self.seed, purpose, draw.epoch, self.samples[draw.sample].id, draw.repeat)

    def _is_flipped(self, draw: Draw) -> bool:
        if not self.sources[self.samples[draw.sample].source].flip:
            return False
        return bool(torch.rand((), generator=self._stream("flip", draw)) < 0.5)

    def _latents(self, draw: Draw) -> Tensor:
        mean, std = self.latents.get(self.samples[draw.sample], self._is_flipped(draw))
        return mean + std * torch.randn(mean.shape, generator=self._stream("latents", draw))

    def _noise(self, draw: Draw, shape: torch.Size) -> Tensor:
        return draw_noise(shape, self._stream("noise", draw), offset=self.draw.noise_offset)

    def _timestep(self, draw: Draw) -> int:
        low, high = self.draw.timesteps
        return sample_timestep(self._stream("timestep", draw), low, high)


def sample_sizes(sample: Sample, flipped: bool = False) -> Tensor:
    """The picture's `size_numbers`, (6,), float32: file, true crop, bucket. flipped: of the mirror image."""
    left, top = sample.fit.crop
    if flipped:
        left = sample.fit.resized.width - sample.bucket.width - left
    return torch.tensor(size_numbers(sample.size, (left, top), sample.bucket), dtype=torch.float32)


class LoadedBatches(Iterator[Batch]):
    """Micro-batches `start` to `stop` in order, made by `workers` processes ahead of time (0: in this process).

    Close it: the workers ignore signals, and Python would wait for them for ever before it ends.
    """

    def __init__(self, source: BatchSource, start: int, stop: int, workers: int) -> None:
        indices: Any = range(start, stop)  # any iterable of indices will do; the annotation asks for a Sampler
        loader: DataLoader[Batch | RunError | UserError] = DataLoader(
            _InWords(source),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_begin_worker,
            # A loader seeds its workers from this generator; left out, it would draw from the global one.
            generator=stream(source.seed, "loader"),
        )
        self._batches: Iterator[Batch | RunError | UserError] = iter(loader)

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except BaseException as error:
            clear_frames(error.__traceback__)  # they hold the loader's iterator, with which the workers end
            raise
        if isinstance(batch, Batch):
            return batch
        raise batch

    def close(self) -> None:
        """End the workers; there is no further batch."""
        self._batches = iter(())


@dataclass(frozen=True)
class _InWords(Dataset[Batch | RunError | UserError]):
    """A source that hands on errors in words for people as they are: a loader would put a traceback before them."""

    source: BatchSource

    def __getitem__(self, index: int) -> Batch | RunError | UserError:
        try:
            return self.source[index]
        except (RunError, UserError) as error:
            return error


def _begin_worker(_number: int) -> None:
    """It passes over signals and encodes nothing."""
    # What ends a run is often sent to all its processes. The trainer stops with care, and still needs its batches.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    worker = get_worker_info()
    assert worker is not None and isinstance(worker.dataset, _InWords)
    worker.dataset.source.latents.only_read()


def _as_is(batch: Any) -> Any:
    return batch
