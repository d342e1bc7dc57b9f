"""The one engine that draws pictures: training previews, the command line, regression images.

A request carries everything that decides its picture, adapters included, and the base's weights are never written to.
So requests with different adapters share a batch, and no request leaves a trace in the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.emphasis import Piece, is_weighted, parse_emphasis, plain_text
from lora_diffusion.generation.loaded import LoadedAdapters
from lora_diffusion.generation.preview import LatentPreview
from lora_diffusion.generation.request import Request, resolve_tags
from lora_diffusion.generation.samplers import Scheduler, build_scheduler, sampler_named, takes_generator
from lora_diffusion.models.base import Conditioning, DiffusionModel, size_numbers
from lora_diffusion.timesteps import max_denoising_steps

__all__ = ["Cancelled", "Engine", "Request"]

OnStep = Callable[[int, int], None]
OnPreview = Callable[[int, Callable[[], Image.Image]], None]


class Cancelled(Exception):
    """Raised by an `on_step` to end the drawing: nobody wants the pictures any more."""


@dataclass(frozen=True)
class _Batch:
    """Requests that go through the UNet together, where each stood in the caller's list, and their sampler."""

    indices: tuple[int, ...]
    requests: tuple[Request, ...]
    chunks: int
    scheduler: Scheduler


class Engine:
    """Draws with a model that stays as it is: frozen, in whatever mode and with whatever training adapters it has."""

    def __init__(self, model: DiffusionModel, *, batch_size: int = 8) -> None:
        """batch_size: pictures that go through the UNet together at most; bounds the memory used."""
        self.model = model
        self.batch_size = batch_size
        self._num_tokens = lru_cache(256)(partial(_count_tokens, model))  # pictures of one order have texts in common
        self._loaded = LoadedAdapters(model)
        self._lock = threading.Lock()  # the model's adapters belong to one drawing at a time
        self._home: torch.device | None = None  # where the model belongs, while it makes way

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self._loaded.names

    @property
    def adapter_bytes(self) -> dict[str, int]:
        """Memory that the weights of each loaded adapter take."""
        return self._loaded.num_bytes

    def load_adapter(self, name: str, file: AdapterFile) -> tuple[str, ...]:
        """Make `file` usable in requests under `name`. Until a request names it, pictures stay as they were.

        Returns what a user should know of it: the file's notes, and whether modules have no layer in this model.

        Raises UserError when the name is taken or cannot be written as `<lora:name:1>`, AdapterFileError when the file
        does not fit the model; the engine is then as before.
        """
        with self._lock:
            return self._loaded.load(name, file)

    def unload_adapter(self, name: str) -> None:
        """Take the adapter out of memory; with the last one gone, the model is bit for bit as it was."""
        with self._lock:
            self._loaded.unload(name)

    def make_way(self) -> None:
        """Move model and adapters off the device, for others to use its memory; the next drawing brings them back."""
        with self._lock:
            home = self._home or self._device
            if home.type != "cpu":
                self._home = home
                self._move(torch.device("cpu"))

    def complete(self, request: Request) -> Request:
        """The request as it will be drawn: tags moved from the prompt to the adapters, the size filled in.

        Raises UserError for anything that cannot be drawn.
        """
        request = self.checked(request)
        self._loaded.check(request.adapters)
        return request

    def checked(self, request: Request) -> Request:
        """As `complete`, for a request whose adapters are still to be loaded."""
        request = resolve_tags(request)
        _check_numbers(request, self.model.schedule.num_steps)
        self.model.check_clip_skip(request.clip_skip)
        sampler_named(request.sampler)
        width, height = request.size or self.model.default_size
        _check_size(width, height, self.model.resolution_step)
        return replace(request, size=(width, height))

    def generate(
        self, requests: Sequence[Request], *, on_step: OnStep | None = None, on_preview: OnPreview | None = None
    ) -> list[Image.Image]:
        """One picture per request, in order. What is drawn together changes a picture by float rounding at most.

        on_step: called with (UNet evaluations done, all of them); an exception from it, such as `Cancelled`, ends the
        drawing and leaves the engine ready for the next. on_preview: called at each step with each picture's place in
        `requests` and a function that draws it small, as it is going to be; that costs nothing until it is called.
        Raises UserError before anything is drawn if a request is wrong, RunError when a picture has values that are
        not finite.
        """
        images: dict[int, Image.Image] = {}
        with self._lock, torch.no_grad(), _evaluation_mode(self.model):
            self._come_back()
            batches = self._batches([self.complete(request) for request in requests])
            progress = _Progress(sum(len(batch.scheduler.timesteps) for batch in batches), on_step, on_preview)
            try:
                for batch in batches:
                    latents = self._denoise(batch, self._encode(batch), progress)
                    for index, request, image in zip(batch.indices, batch.requests, latents, strict=True):
                        images[index] = self._decode(image, request)
            finally:
                self._loaded.use_none()
        return [images[index] for index in range(len(requests))]

    def batch_key(self, request: Request) -> tuple[object, ...]:
        """Complete requests with equal keys share UNet evaluations."""
        return (request.size, request.steps, request.sampler, request.cfg, self._num_chunks(request))

    @cached_property
    def preview(self) -> LatentPreview:
        """Fitted to the model's VAE at its first use."""
        return LatentPreview.fit(self.model)

    @property
    def _device(self) -> torch.device:
        return self.model.unet.device

    def _come_back(self) -> None:
        if self._home is not None:
            self._move(self._home)
            self._home = None

    def _move(self, device: torch.device) -> None:
        nn.Module.to(self.model, device)
        self._loaded.to(device)

    def _batches(self, requests: Sequence[Request]) -> list[_Batch]:
        """Requests that can share UNet evaluations, at most `batch_size` together."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self.batch_key(request), []).append(index)
        batches: list[_Batch] = []
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                part = tuple(indices[start : start + self.batch_size])
                first = requests[part[0]]
                scheduler = build_scheduler(
                    first.sampler, self.model.scheduler_config, self.model.schedule, first.steps, self._device
                )
                batches.append(_Batch(part, tuple(requests[i] for i in part), self._num_chunks(first), scheduler))
        return batches

    def _num_chunks(self, request: Request) -> int:
        """Token chunks of the longer of the two texts: a picture must not depend on the prompts beside it."""
        texts = [request.prompt, request.negative] if request.cfg > 1 else [request.prompt]
        longest = max(self._num_tokens(text) for text in texts)
        return max(1, -(-longest // self.model.max_tokens))

    def _encode(self, batch: _Batch) -> Conditioning:
        """All negative prompts, then all prompts; without guidance the prompts only.

        One image at a time, each with its own adapters: the encoder sees several token chunks per image.
        """
        negatives: list[Conditioning] = []
        prompts: list[Conditioning] = []
        for request in batch.requests:
            self._loaded.use([request])
            if request.cfg > 1:
                negatives.append(self._encode_one(request.negative, request, batch.chunks))
            prompts.append(self._encode_one(request.prompt, request, batch.chunks))
        return Conditioning.cat(negatives + prompts)

    def _encode_one(self, text: str, request: Request, chunks: int) -> Conditioning:
        pieces = parse_emphasis(text)
        conditioning = self.model.encode_text([plain_text(pieces)], clip_skip=request.clip_skip, chunks=chunks)
        if not is_weighted(pieces):
            return conditioning
        weights = self._token_weights(pieces, chunks).to(conditioning.hidden.device)
        return replace(conditioning, hidden=_emphasised(conditioning.hidden, weights))

    def _token_weights(self, pieces: Sequence[Piece], chunks: int) -> Tensor:
        """(chunks, tokens per chunk): begin and end marks and padding have weight 1."""
        length = self.model.max_tokens
        weights = [piece.weight for piece in pieces for _ in range(self.model.count_tokens(piece.text))]
        weights = weights[: chunks * length] + [1.0] * (chunks * length - len(weights))
        marks = torch.ones(chunks, 1)
        return torch.cat([marks, torch.tensor(weights).reshape(chunks, length), marks], dim=1)

    def _denoise(self, batch: _Batch, conditioning: Conditioning, progress: _Progress) -> Tensor:
        """Latents of all images, float32 (B, C, h, w)."""
        self._loaded.use(batch.requests)
        size = batch.requests[0].size or self.model.default_size
        conditioning = conditioning.with_size(torch.tensor(size_numbers(size, (0, 0), size)))
        scheduler, cfg = batch.scheduler, batch.requests[0].cfg
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch.requests]
        extra: dict[str, Any] = {"generator": generators} if takes_generator(scheduler) else {}
        latents = self._first_noise(batch, generators) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents, timestep)
            if cfg > 1:
                noisy = torch.cat([noisy, noisy])  # (2B, C, h, w), in the order of `_encode`
            prediction = self.model.predict(noisy, timestep.expand(len(noisy)), conditioning)
            if cfg > 1:
                away, towards = prediction.chunk(2)
                prediction = away + cfg * (towards - away)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if progress.on_preview:
                for row, index in enumerate(batch.indices):
                    progress.on_preview(index, partial(self._draw_unfinished, noisy[row], prediction[row], timestep))
            progress.advance()
        return latents

    def _draw_unfinished(self, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Image.Image:
        """What the model takes the finished picture to be. noisy, prediction: (C, h, w)."""
        t = timestep.round().long().reshape(1)
        return self.preview.draw(self.model.schedule.estimate(noisy[None], prediction[None], t)[0])

    def _first_noise(self, batch: _Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Each image's own, from a CPU generator as in diffusers: one seed means one picture on every device."""
        width, height = batch.requests[0].size or self.model.default_size
        factor = self.model.latent_factor
        shape = (1, self.model.latent_channels, height // factor, width // factor)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self._device)

    def _decode(self, latents: Tensor, request: Request) -> Image.Image:
        """latents: (C, h, w). One image at a time: the decoder needs far more memory than the UNet."""
        pixels = self.model.decode_latents(latents[None])[0]  # (3, H, W) in [-1, 1]
        if not bool(torch.isfinite(pixels).all()):
            raise RunError(
                f"The picture of {request.prompt[:60]!r} (seed {request.seed}) has values that are not finite. "
                "Lower the adapters' strengths, or use precision fp32 or bf16 in place of fp16."
            )
        values = ((pixels / 2 + 0.5) * 255).round().to(torch.uint8)
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


@dataclass
class _Progress:
    """Counts UNet evaluations for `on_step`."""

    total: int
    on_step: OnStep | None
    on_preview: OnPreview | None
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        if self.on_step:
            self.on_step(self.done, self.total)


def _emphasised(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states times their tokens' weights, each chunk scaled to the mean that it had, as A1111 does.

    hidden: (1, chunks · tokens, D). weights: (chunks, tokens).
    """
    chunks = hidden.reshape(*weights.shape, -1).float()
    weighted = chunks * weights[..., None]
    means = chunks.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)
    return (weighted * means).reshape(hidden.shape).to(hidden.dtype)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Generator[None]:
    """Dropout off; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _count_tokens(model: DiffusionModel, text: str) -> int:
    return model.count_tokens(plain_text(parse_emphasis(text)))


def _check_numbers(request: Request, num_steps: int) -> None:
    most = max_denoising_steps(num_steps)
    if not 1 <= request.steps <= most:
        raise UserError(f"steps is {request.steps}; it must be from 1 to {most}.")
    if not (math.isfinite(request.cfg) and request.cfg >= 1):
        raise UserError(f"cfg is {request.cfg}; it must be 1 (no guidance) or more. Usual values are 4 to 9.")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"seed is {request.seed}; it must be from 0 to 2^63 - 1.")
    if request.clip_skip < 1:
        raise UserError(f"clip_skip is {request.clip_skip}; it must be 1 (the last layer) or more.")
    for name, strength in request.adapters.items():
        if not math.isfinite(strength):
            raise UserError(f"The strength of adapter {name!r} is {strength}; it must be a finite number.")


def _check_size(width: int, height: int, step: int) -> None:
    if width > 0 and height > 0 and width % step == 0 and height % step == 0:
        return
    smaller = (max(step, width // step * step), max(step, height // step * step))
    larger = (max(step, -(-width // step) * step), max(step, -(-height // step) * step))
    near = " or ".join(f"{w}x{h}" for w, h in dict.fromkeys((smaller, larger)))
    raise UserError(f"size {width}x{height}: this model draws sides that are multiples of {step} px. Use {near}.")
