"""How long a step takes and how much memory it needs, told from a few real passes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.models.base import Conditioning, DiffusionModel, size_numbers
from lora_diffusion.models.packed_conv import PackedConv2d
from lora_diffusion.streams import stream

_QUICK_S = 2.0  # a forward pass below this, counting included, is followed by whole steps that are timed
_NUM_TIMED = 4  # the first ones also warm caches up
_BACKWARD_COST = 1.3  # gradients of inputs only, plus the adapters' own; measured on the SD 1.5 architecture
_OPTIMIZER_COPIES = 4  # adapter weights, gradients, two moments of AdamW, all float32


@dataclass(frozen=True)
class StepEstimate:
    """seconds: per optimiser step. memory_bytes: peak of the training process or of the GPU."""

    seconds: float
    memory_bytes: int


def estimate_step(
    model: DiffusionModel, size: tuple[int, int], batch_size: int, *, accumulation: int, num_tokens: int
) -> StepEstimate:
    """Run the UNet, adapters injected, on one sample of `size` (width, height) px and scale the result up.

    The activations kept for the backward pass are counted as autograd stores them.
    """
    device = next(model.unet.parameters()).device
    width, height = size
    shape = (1, model.latent_channels, height // model.latent_factor, width // model.latent_factor)
    noisy = torch.randn(shape, generator=stream(0, "estimate")).to(device)
    with torch.no_grad():
        text = model.encode_text([""], chunks=num_tokens // 75)
    text = text.with_size(torch.tensor(size_numbers(size, (0, 0), size)))
    seconds, activations = _forward(model, noisy, text)
    recomputed = 1.0 if getattr(model.unet, "is_gradient_checkpointing", False) else 0.0
    if seconds < _QUICK_S:
        # Small models are bound by the number of operations, not by their size: time the real batch.
        batch = noisy.expand(batch_size, -1, -1, -1)
        texts = Conditioning.cat([text] * batch_size)
        seconds = min(_step(model, batch, texts) for _ in range(_NUM_TIMED))
    else:
        seconds *= batch_size * (1 + _BACKWARD_COST + recomputed)
    trained = {id(p): p for m in model.modules() if isinstance(m, Adapter) for p in m.trained()}
    memory = (
        _baseline_bytes(device)
        + sum(p.numel() * p.element_size() for p in model.parameters())
        + sum(m.packed_bytes for m in model.modules() if isinstance(m, PackedConv2d))
        + activations * batch_size
        + sum(p.numel() * p.element_size() for p in trained.values()) * (_OPTIMIZER_COPIES - 1)
    )
    return StepEstimate(seconds * accumulation, memory)


def _forward(model: DiffusionModel, noisy: Tensor, text: Conditioning) -> tuple[float, int]:
    """(seconds, bytes that autograd keeps for the backward pass)."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    timesteps = torch.full((noisy.shape[0],), model.schedule.num_steps // 2, device=noisy.device)
    with torch.autograd.graph.saved_tensors_hooks(count, _unchanged), torch.enable_grad():
        started = time.perf_counter()
        prediction = model.predict(noisy, timesteps, text)
        _synchronise(noisy.device)
        seconds = time.perf_counter() - started
    del prediction
    return seconds, sum(kept.values())


def _step(model: DiffusionModel, noisy: Tensor, text: Conditioning) -> float:
    """Seconds of a forward and a backward pass. No gradient is left behind."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    timesteps = torch.full((noisy.shape[0],), model.schedule.num_steps // 2, device=noisy.device)
    started = time.perf_counter()
    with torch.enable_grad():
        loss = model.predict(noisy, timesteps, text).float().square().mean()
        torch.autograd.grad(loss, trained, allow_unused=True)
    _synchronise(noisy.device)
    return time.perf_counter() - started


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _baseline_bytes(device: torch.device) -> int:
    """What the process holds besides the model: libraries on a CPU, the CUDA context on a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, total - free - torch.cuda.memory_reserved(device))
    return 700 * 2**20  # resident size after importing torch, diffusers and transformers
