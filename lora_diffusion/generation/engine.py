"""The one engine that draws pictures: training previews, the command line, regression images.

A request carries everything that decides its picture, adapters included, and the base's weights are never written to.
So requests with different adapters share a batch, and no request leaves a trace in the next.
"""

from __future__ import annotations

import difflib
import logging
import math
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.inject import eject, inject
from lora_diffusion.adapters.kinds import adapter_from_tensors
from lora_diffusion.adapters.stack import AdapterStack, StackWeights
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.request import Request, check_adapter_name, resolve_tags
from lora_diffusion.generation.samplers import Scheduler, build_scheduler, sampler_named, takes_generator
from lora_diffusion.models.base import Conditioning, DiffusionModel, size_numbers

__all__ = ["Engine", "Request"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """One layer of the model, and what a loaded adapter does to it."""

    part: str
    path: str
    adapter: Adapter


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
        self._loaded: dict[str, list[_Place]] = {}
        self._stacks: dict[str, dict[str, AdapterStack]] = {}
        self._weights = StackWeights()
        self._lock = threading.Lock()  # stacks and weights belong to one drawing at a time

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._loaded)

    def load_adapter(self, name: str, file: AdapterFile) -> None:
        """Make `file` usable in requests under `name`. Until a request names it, pictures stay as they were.

        Raises UserError when the name is taken or cannot be written as `<lora:name:1>`, AdapterFileError when the file
        does not fit the model; the engine is then as before.
        """
        check_adapter_name(name)
        with self._lock:
            if name in self._loaded:
                raise UserError(
                    f"An adapter named {name!r} is loaded already. Unload it first, or choose another name."
                )
            with self._rebuilt_stacks():
                self._loaded[name] = _places(self.model, file)

    def unload_adapter(self, name: str) -> None:
        """Take the adapter out of memory; with the last one gone, the model is bit for bit as it was."""
        with self._lock:
            self._check_loaded([name])
            with self._rebuilt_stacks():
                del self._loaded[name]

    def complete(self, request: Request) -> Request:
        """The request as it will be drawn: tags moved from the prompt to the adapters, the size filled in.

        Raises UserError for anything that cannot be drawn.
        """
        request = resolve_tags(request)
        self._check_loaded(request.adapters)
        _check_numbers(request, self.model.schedule.num_steps)
        self.model.check_clip_skip(request.clip_skip)
        sampler_named(request.sampler)
        width, height = request.size or self.model.default_size
        _check_size(width, height, self.model.resolution_step)
        return replace(request, size=(width, height))

    def generate(
        self, requests: Sequence[Request], *, on_step: Callable[[int, int], None] | None = None
    ) -> list[Image.Image]:
        """One picture per request, in order. What is drawn together changes a picture by float rounding at most.

        on_step: called with (UNet evaluations done, all of them); an exception from it ends the drawing and leaves the
        engine ready for the next. Raises UserError before anything is drawn if a request is wrong, RunError when a
        picture has values that are not finite.
        """
        images: dict[int, Image.Image] = {}
        with self._lock, torch.no_grad(), _evaluation_mode(self.model):
            batches = self._batches([self.complete(request) for request in requests])
            progress = _Progress(sum(len(batch.scheduler.timesteps) for batch in batches), on_step)
            try:
                for batch in batches:
                    latents = self._denoise(batch, self._encode(batch), progress)
                    for index, request, image in zip(batch.indices, batch.requests, latents, strict=True):
                        images[index] = self._decode(image, request)
            finally:
                self._weights.clear()
        return [images[index] for index in range(len(requests))]

    @property
    def _device(self) -> torch.device:
        return self.model.unet.device

    def _batches(self, requests: Sequence[Request]) -> list[_Batch]:
        """Requests that can share UNet evaluations, at most `batch_size` together."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(requests):
            key = (request.size, request.steps, request.sampler, request.cfg, self._num_chunks(request))
            groups.setdefault(key, []).append(index)
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
        longest = max(self.model.count_tokens(text) for text in texts)
        return max(1, -(-longest // self.model.max_tokens))

    def _encode(self, batch: _Batch) -> Conditioning:
        """All negative prompts, then all prompts; without guidance the prompts only.

        One image at a time, each with its own adapters: the encoder sees several token chunks per image.
        """
        negatives: list[Conditioning] = []
        prompts: list[Conditioning] = []
        for request in batch.requests:
            self._use_adapters([request])
            if request.cfg > 1:
                negatives.append(self._encode_one(request.negative, request, batch.chunks))
            prompts.append(self._encode_one(request.prompt, request, batch.chunks))
        return Conditioning.cat(negatives + prompts)

    def _encode_one(self, text: str, request: Request, chunks: int) -> Conditioning:
        return self.model.encode_text([text], clip_skip=request.clip_skip, chunks=chunks)

    def _denoise(self, batch: _Batch, conditioning: Conditioning, progress: _Progress) -> Tensor:
        """Latents of all images, float32 (B, C, h, w)."""
        self._use_adapters(batch.requests)
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
            progress.advance()
        return latents

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

    def _use_adapters(self, requests: Sequence[Request]) -> None:
        """From now on image i of a batch sees the adapters of request i."""
        if not self._loaded:
            return
        names = self.adapters
        values = [[request.adapters.get(name, 0.0) for name in names] for request in requests]
        self._weights.set(names, torch.tensor(values, device=self._device))

    @contextmanager
    def _rebuilt_stacks(self) -> Generator[None]:
        """Inside, the model is without stacks; after it, it has those that `_loaded` asks for, also on an error."""
        for part, stacks in self._stacks.items():
            eject(self.model.parts[part].module, stacks)
        self._stacks = {}
        try:
            yield
        finally:
            for part, component in self.model.parts.items():
                self._stacks[part] = self._inject_stacks(part, component.module)

    def _inject_stacks(self, part: str, module: nn.Module) -> dict[str, AdapterStack]:
        layers: dict[str, Layer] = {}
        adapters: dict[str, list[tuple[str, Adapter]]] = {}
        for name, places in self._loaded.items():
            for place in places:
                if place.part == part:
                    layers[place.path] = place.adapter.base
                    adapters.setdefault(place.path, []).append((name, place.adapter))

        def make(path: str, layer: Layer) -> AdapterStack:
            stack = AdapterStack(layer, self._weights)
            for name, adapter in adapters[path]:
                stack.add(name, adapter)
            return stack

        return inject(module, layers, make)

    def _check_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._loaded:
                near = difflib.get_close_matches(name, self._loaded, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                known = ", ".join(self._loaded) or "none"
                raise UserError(f"No adapter named {name!r} is loaded. {hint}Loaded: {known}.")


@dataclass
class _Progress:
    """Counts UNet evaluations for `on_step`."""

    total: int
    on_step: Callable[[int, int], None] | None
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        if self.on_step:
            self.on_step(self.done, self.total)


def _places(model: DiffusionModel, file: AdapterFile) -> list[_Place]:
    """Adapters with the file's weights on the layers they belong to; the model is not changed."""
    attachment = file.attach(model.parts)
    for match in attachment.matches:
        if model.parts[match.part].module.get_submodule(match.path) is not match.layer:
            raise UserError(
                f"{file.path}: {match.part}.{match.path} has an adapter in training. Load adapters into another copy "
                "of the model."
            )
    if attachment.unread:
        logger.warning(
            "%s: %d of %d modules do not exist in this model and are left out (the first: %s)",
            file.path,
            len(attachment.unread),
            len(file.modules),
            attachment.unread[0],
        )
    return [
        _Place(match.part, match.path, adapter_from_tensors(match.layer, match.tensors)) for match in attachment.matches
    ]


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


def _check_numbers(request: Request, num_steps: int) -> None:
    if not 1 <= request.steps <= num_steps:
        raise UserError(f"steps is {request.steps}; it must be from 1 to {num_steps}.")
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
