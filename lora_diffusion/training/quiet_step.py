"""The optimiser step that GPUs run: all of it on the device, launched without waiting for any value.

It computes what `Trainer` computes eagerly. Values for the log arrive some steps late; a loss that is not finite is
noticed as late, but has changed nothing (see `QuietUpdate`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.graph import StepGraphs
from lora_diffusion.training.update import QuietUpdate

_FIELDS = ("latents", "noise", "timesteps", "weights", "sizes")


@dataclass(frozen=True)
class Reading:
    """What a step's log line needs: its number from 1, its loss and the norm of its gradients."""

    step: int
    loss: float
    grad_norm: float


class QuietStep:
    """One optimiser step as a function of tensors: gradients of all micro-batches, clipping, update."""

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        max_norm: float,
        device: torch.device,
        *,
        as_graph: bool,
    ) -> None:
        """loss: a `DenoisingLoss`. optimizer: fused AdamW over `parameters`, which are on `device`.

        as_graph: replay CUDA graphs, one per shape of the inputs; False launches every operation.
        """
        self._loss = loss
        self._optimizer = optimizer
        for group in optimizer.param_groups:  # read by the graph when it runs, and so a tensor
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = device.type == "cuda"
        self._update = QuietUpdate(optimizer, parameters, max_norm)
        self._values = torch.zeros(2, device=device)
        self._run: Callable[[Mapping[str, Tensor]], None] = StepGraphs(self._step, device) if as_graph else self._step

    @property
    def is_broken(self) -> bool:
        """Whether any loss or norm so far was not finite. Waits for the device."""
        return bool(self._update.broken)

    def __call__(self, inputs: Mapping[str, Tensor], rates: Sequence[float]) -> Tensor:
        """inputs: see `inputs_of`. rates: the learning rate of each parameter group.

        Returns (loss, norm of the gradients), on the device, until the next call.
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        self._run(inputs)
        return self._values

    def _step(self, inputs: Mapping[str, Tensor]) -> None:
        self._update.zero_gradients()
        total = torch.zeros_like(self._values[0])
        for index in range(num_micro_batches(inputs)):
            batch, text = _batch_of(inputs, index)
            losses: Tensor = self._loss(batch, text)  # (B,)
            loss = (losses * batch.weights).sum()
            loss.backward()
            total += loss.detach()
        norm = self._update.apply(total)
        self._values.copy_(torch.stack([total, norm]))


def inputs_of(batches: Sequence[Batch], texts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """The tensors of one step's micro-batches, by index and name: "0.latents", "0.text.hidden", …"""
    inputs: dict[str, Tensor] = {}
    for index, (batch, text) in enumerate(zip(batches, texts, strict=True)):
        inputs |= {f"{index}.{name}": getattr(batch, name) for name in _FIELDS}
        inputs |= {f"{index}.text.{name}": tensor for name, tensor in text.texts().items()}
    return inputs


def num_micro_batches(inputs: Mapping[str, Tensor]) -> int:
    return sum(name.endswith(".latents") for name in inputs)


def _batch_of(inputs: Mapping[str, Tensor], index: int) -> tuple[Batch, Conditioning]:
    batch = Batch(**{name: inputs[f"{index}.{name}"] for name in _FIELDS}, captions=(), names=())
    pooled = inputs.get(f"{index}.text.pooled")
    return batch, Conditioning(inputs[f"{index}.text.hidden"], pooled)


class Readings:
    """Values on their way from the device to the host, in the order of their steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, values: Tensor) -> None:
        """values: (loss, norm), which may be overwritten by the next step."""
        if self._device.type != "cuda":
            self._waiting.append((step, values.clone(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        has_arrived = torch.cuda.Event()
        has_arrived.record()
        self._waiting.append((step, host, has_arrived))

    def take(self, *, wait: bool) -> list[Reading]:
        """Those that have arrived; with `wait`, all of them."""
        taken: list[Reading] = []
        while self._waiting:
            step, values, event = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    break
                event.synchronize()
            loss, norm = values.tolist()
            taken.append(Reading(step, loss, norm))
            self._waiting.popleft()
        return taken


class ResidentTexts:
    """Embeddings of captions that stay on the device, up to a size in all; the least recently used go first."""

    def __init__(self, get: Callable[[str], Mapping[str, Tensor]], device: torch.device, budget_bytes: int) -> None:
        """get: a caption's tensors on the host, without a batch dimension (`TextCache.get`)."""
        self._get = get
        self._device = device
        self._free_bytes = budget_bytes
        self._entries: dict[str, Mapping[str, Tensor]] = {}  # in the order of use

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        entries = [self._entry(caption) for caption in captions]
        return Conditioning(**{name: torch.stack([entry[name] for entry in entries]) for name in entries[0]})

    def _entry(self, caption: str) -> Mapping[str, Tensor]:
        entry = self._entries.pop(caption, None)
        if entry is None:
            entry = {name: tensor.to(self._device) for name, tensor in self._get(caption).items()}
            self._free_bytes -= _num_bytes(entry)
        self._entries[caption] = entry
        while self._free_bytes < 0 and len(self._entries) > 1:
            self._free_bytes += _num_bytes(self._entries.pop(next(iter(self._entries))))
        return entry


def _num_bytes(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
