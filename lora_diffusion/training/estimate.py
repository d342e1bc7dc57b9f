"""How long a step takes and how much memory it needs, told from one real forward pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.models.base import Conditioning, DiffusionModel
from lora_diffusion.streams import stream

_QUICK_S = 1.0  # below this a forward pass is repeated: the first one also warms caches up
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
    """Run the UNet once, adapters injected, on one sample of `size` (width, height) px and scale the result up.

    The activations kept for the backward pass are counted as autograd stores them.
    """
    device = next(model.unet.parameters()).device
    width, height = size
    shape = (1, model.latent_channels, height // model.latent_factor, width // model.latent_factor)
    noisy = torch.randn(shape, generator=stream(0, "estimate")).to(device)
    with torch.no_grad():
        hidden = model.encode_text([""], chunks=num_tokens // 75).hidden
    seconds, activations = _forward(model, noisy, Conditioning(hidden))
    if seconds < _QUICK_S:
        # Small models are bound by the number of operations, not by their size: time the real batch.
        whole = Conditioning(hidden.expand(batch_size, -1, -1))
        for _ in range(2):
            seconds, _ = _forward(model, noisy.expand(batch_size, -1, -1, -1), whole)
    else:
        seconds *= batch_size
    recomputed = 1.0 if getattr(model.unet, "is_gradient_checkpointing", False) else 0.0
    adapters = [p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters() if p.requires_grad]
    memory = (
        _baseline_bytes(device)
        + sum(p.numel() * p.element_size() for p in model.parameters())
        + activations * batch_size
        + sum(p.numel() * p.element_size() for p in adapters) * (_OPTIMIZER_COPIES - 1)
    )
    return StepEstimate(seconds * (1 + _BACKWARD_COST + recomputed) * accumulation, memory)


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
