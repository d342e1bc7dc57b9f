"""How long a step takes, how much memory it needs and which batch fits, told from a few real steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.models.base import Conditioning, DiffusionModel, size_numbers
from lora_diffusion.models.heap import trim_heap
from lora_diffusion.streams import stream
from lora_diffusion.training import graph, recording
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.memory import PeakMemory, is_out_of_memory, memory_limit
from lora_diffusion.training.quiet_step import inputs_of, inputs_of_texts
from lora_diffusion.training.validation import NUM_TIMESTEPS

_QUICK_S = 2.0  # a step of one sample below this is followed by steps of the whole batch, which are timed
_NUM_TIMED = 4  # the first ones also warm caches up
_LAUNCHED_S = 1.0  # a step of the whole batch below this is timed as it is launched, too: longer ones are arithmetic
_NUM_PREPARING = 1 + max(graph.NUM_WARM_UPS, recording.NUM_WARM_UPS)  # steps until one is replayed
_NUM_MOMENTS = 2  # that AdamW keeps of each trained value, float32; a real step here has made gradients, but not these
_USABLE = 0.92  # of the memory there is: allocators waste some, and other programs want some
_LARGEST = 4096  # of `run.batch_size`

LaunchStep = Callable[[Mapping[int, Mapping[str, Tensor]]], None]


@dataclass(frozen=True)
class StepEstimate:
    """seconds: per optimiser step. memory_bytes: peak of the training process or of the GPU.

    largest_batch: what would fit into `limit_bytes`, the memory that is free for it now; 0: not even one picture.
    """

    seconds: float
    memory_bytes: int
    largest_batch: int
    limit_bytes: int


def estimate_step(
    model: DiffusionModel,
    size: tuple[int, int],
    batch_size: int,
    *,
    encode: Callable[[], Conditioning],
    accumulation: int,
    other_shapes: Iterable[tuple[tuple[int, int], int]] = (),
    launch: LaunchStep | None = None,
) -> StepEstimate:
    """Run forward and backward passes, adapters injected, on samples of `size` (width, height) px.

    encode: gives the conditioning of one caption as a step gets it: from a cache, or by the text encoder that is
    trained. Call it with the model as it is trained, unused parts released and convolutions packed. A step of
    one sample and, where that is quick, of the whole batch are measured; between and beyond, memory and time of a
    sample are taken from autograd's count of what it keeps, and from the first step.

    other_shapes: (size, pictures) of batches that are smaller. On a CPU each costs memory for good, as oneDNN keeps the
    code that it has made for a shape: in bfloat16 half a megabyte for each of some hundred operations.
    launch: makes a step as the run will, from its members' inputs (see `QuietStep`), and changes the adapters by it. A
    graph or a recording takes a fraction of the time that calling a small base's operations one by one does.
    """
    device = next(model.unet.parameters()).device
    probe = _Probe(model, size, encode)
    held = probe.kept_bytes()
    first = probe.run(1)
    again = probe.run(1) if first[0] < _QUICK_S else first  # the first one prepares kernels
    seconds, peak = min(first[0], again[0]) * batch_size, max(first[1], again[1]) + held * (batch_size - 1)
    if first[0] < _QUICK_S and batch_size > 1 and peak < memory_limit(device):
        runs = [probe.run(batch_size) for _ in range(_NUM_TIMED)]
        seconds, peak = min(run[0] for run in runs), max(run[1] for run in runs)
    if seconds < _QUICK_S and device.type == "cpu":
        peak = max([peak, *(_Probe(model, other, encode).run(rows)[1] for other, rows in other_shapes)])
    moments = _NUM_MOMENTS * sum(p.numel() * 4 for p in _trained(model))
    limit = int(memory_limit(device) * _USABLE)
    room = limit - moments - max(first[1], again[1])
    largest = min(_LARGEST, 1 + room // max(held, 1)) if room >= 0 else 0
    if launch is not None and seconds < _LAUNCHED_S and batch_size <= largest:
        try:
            seconds = probe.seconds_as_launched(launch, batch_size)
        except (RuntimeError, MemoryError) as error:  # a graph may want more than operations that are called singly
            if not is_out_of_memory(error):
                raise
    return StepEstimate(seconds * accumulation, peak + moments, largest, limit)


def estimate_validation(
    model: DiffusionModel, size: tuple[int, int], rows: int, encode: Callable[[], Conditioning]
) -> float:
    """Seconds that validation takes for a picture of `size` px, `rows` timesteps at once at most.

    Call it as `estimate_step`. It needs less memory than a step of as many rows: nothing is kept for a backward pass.
    """
    probe, rows = _Probe(model, size, encode), min(rows, NUM_TIMESTEPS)
    seconds = probe.seconds_without_gradients(rows)
    if seconds < _QUICK_S:  # the first one prepares kernels
        seconds = min(seconds, probe.seconds_without_gradients(rows))
    return seconds * math.ceil(NUM_TIMESTEPS / rows)


def encoding_bytes(model: DiffusionModel, size: tuple[int, int], batch_size: int) -> int:
    """Peak memory while pictures of `size` (width, height) px are encoded, `batch_size` at once; measured on one."""
    device = model.vae.device  # the UNet may still wait elsewhere
    trim_heap()  # or the picture takes memory that counts already
    with PeakMemory(device) as before:
        pixels = torch.zeros(1, 3, size[1], size[0], device=device)
    with PeakMemory(device) as during:
        model.encode_image(pixels)
    return during.bytes + (batch_size - 1) * (during.bytes - before.bytes)


class _Probe:
    """Real passes over samples of one size."""

    def __init__(self, model: DiffusionModel, size: tuple[int, int], encode: Callable[[], Conditioning]) -> None:
        self._model = model
        self._device = next(model.unet.parameters()).device
        width, height = size
        shape = (1, model.latent_channels, height // model.latent_factor, width // model.latent_factor)
        self._noisy = torch.randn(shape, generator=stream(0, "estimate")).to(self._device)
        self._encode = encode
        self._size = torch.tensor(size_numbers(size, (0, 0), size), dtype=torch.float32)
        # As graphs are captured: cuBLAS keeps memory for each stream that it was used on.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def run(self, batch_size: int) -> tuple[float, int]:
        """(seconds, peak memory) of a forward and a backward pass. No gradient is left behind."""
        noisy = self._noisy.expand(batch_size, -1, -1, -1)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._wait()
        with PeakMemory(self._device) as memory, torch.cuda.stream(self._stream), torch.enable_grad():
            started = time.perf_counter()
            loss = self._predict(noisy).float().square().mean()
            torch.autograd.grad(loss, trained, allow_unused=True)
            self._wait()
            seconds = time.perf_counter() - started
        return seconds, memory.bytes

    def seconds_without_gradients(self, batch_size: int) -> float:
        """Of a forward pass alone."""
        self._wait()
        started = time.perf_counter()
        with torch.no_grad():
            self._predict(self._noisy.expand(batch_size, -1, -1, -1))
        self._wait()
        return time.perf_counter() - started

    def seconds_as_launched(self, launch: LaunchStep, batch_size: int) -> float:
        """Of a whole step, once what is replayed of it has been made."""
        noisy, device = self._noisy.repeat(batch_size, 1, 1, 1), self._device
        timesteps = torch.full((batch_size,), self._model.schedule.num_steps // 2, device=device)
        weights = torch.full((batch_size,), 1 / batch_size, device=device)
        sizes = self._size.to(device).repeat(batch_size, 1)
        batch = Batch(noisy, noisy, timesteps, weights=weights, sizes=sizes, captions=(), names=())
        inputs = inputs_of([batch]) | inputs_of_texts([Conditioning.cat([self._encode()] * batch_size)])
        taken: list[float] = []
        for _ in range(_NUM_PREPARING + _NUM_TIMED):
            started = time.perf_counter()
            launch({0: inputs})
            self._wait()
            taken.append(time.perf_counter() - started)
        return min(taken)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def kept_bytes(self) -> int:
        """What autograd keeps of one sample for the backward pass."""
        parameters = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.enable_grad():
            prediction = self._predict(self._noisy)
        del prediction
        return sum(kept.values())

    def _predict(self, noisy: Tensor) -> Tensor:
        text = Conditioning.cat([self._encode() for _ in range(len(noisy))]).with_size(self._size)
        timesteps = torch.full((len(noisy),), self._model.schedule.num_steps // 2, device=self._device)
        return self._model.predict(noisy, timesteps, text)


def _trained(model: DiffusionModel) -> list[Tensor]:
    found = {id(p): p for m in model.modules() if isinstance(m, Adapter) for p in m.trained()}
    return list(found.values())
