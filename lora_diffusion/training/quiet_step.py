"""The optimiser step that GPUs run: all of it on the device, launched without waiting for any value.

It computes what `Trainer` computes eagerly. Values for the log arrive some steps late; a loss that is not finite is
noticed as late, but has changed nothing (see `QuietUpdate`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.graph import StepGraphs
from lora_diffusion.training.prefetch import Copier, Prefetcher
from lora_diffusion.training.update import QuietUpdate
from lora_diffusion.training.working_copies import WorkingCopies

_FIELDS = ("latents", "noise", "timesteps", "weights", "sizes")


@dataclass(frozen=True)
class Reading:
    """What is told of one step: its batches, its learning rate, its loss and the norm of its gradients."""

    batches: Sequence[Batch]
    lr: float
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
        self._copies = WorkingCopies(loss)
        copied = set(map(id, self._copies.parameters))
        rest = [parameter for parameter in parameters if id(parameter) not in copied]
        self._update = QuietUpdate(optimizer, [*self._copies.parameters, *rest], max_norm)
        self._values = torch.zeros(2, device=device)
        self._run: Callable[[Mapping[str, Tensor]], None] = StepGraphs(self._step, device) if as_graph else self._step

    def __call__(self, inputs: Mapping[str, Tensor], rates: Sequence[float]) -> Tensor:
        """inputs: see `inputs_of` and `inputs_of_texts`. rates: the learning rate of each parameter group.

        Returns (loss, norm of the gradients), on the device, until the next call.
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        self._run(inputs)
        return self._values

    def _step(self, inputs: Mapping[str, Tensor]) -> None:
        self._update.zero_gradients()
        total = torch.zeros_like(self._values[0])
        with self._copies:
            for index in range(num_micro_batches(inputs)):
                batch, text = _batch_of(inputs, index)
                losses: Tensor = self._loss(batch, text)  # (B,)
                loss = (losses * batch.weights).sum()
                loss.backward()
                self._copies.gather(self._update.gradients)
                total += loss.detach()
        norm = self._update.apply(total)
        self._values.copy_(torch.stack([total, norm]))


def inputs_of(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The tensors of one step's micro-batches, by index and name: "0.latents", "1.noise", …"""
    return {f"{index}.{name}": getattr(batch, name) for index, batch in enumerate(batches) for name in _FIELDS}


def inputs_of_texts(texts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Theirs, and their captions' encodings are a step's inputs: "0.text.hidden", …"""
    return {f"{i}.text.{name}": tensor for i, text in enumerate(texts) for name, tensor in text.texts().items()}


def num_micro_batches(inputs: Mapping[str, Tensor]) -> int:
    return sum(name.endswith(".latents") for name in inputs)


def _batch_of(inputs: Mapping[str, Tensor], index: int) -> tuple[Batch, Conditioning]:
    batch = Batch(**{name: inputs[f"{index}.{name}"] for name in _FIELDS}, captions=(), names=())
    pooled = inputs.get(f"{index}.text.pooled")
    return batch, Conditioning(inputs[f"{index}.text.hidden"], pooled)


class QuietLoop:
    """Runs a `QuietStep` over batches that a thread makes ahead, and tells later what came of each step."""

    def __init__(
        self,
        step: QuietStep,
        batches: Iterator[Batch],
        accumulation: int,
        texts: Callable[[Sequence[str]], Conditioning],
        device: torch.device,
    ) -> None:
        """batches: micro-batches, on the host. texts: captions → their encoding, on the device."""
        self._step = step
        self._texts = texts
        self._device = device
        self._waiting: deque[tuple[Sequence[Batch], float, Tensor, torch.cuda.Event | None]] = deque()
        copier = Copier(device)

        def prepared() -> Iterator[tuple[list[Batch], Callable[[], dict[str, Tensor]]]]:
            while micro_batches := list(islice(batches, accumulation)):
                yield micro_batches, copier.start(inputs_of(micro_batches))

        self._prepared = Prefetcher(prepared())

    def run(self, rates: Sequence[float]) -> None:
        """Launch the next step. rates: the learning rate of each parameter group."""
        micro_batches, take = next(self._prepared)
        texts = inputs_of_texts([self._texts(batch.captions) for batch in micro_batches])
        values = self._step(take() | texts, rates)
        self._waiting.append((micro_batches, rates[0], *self._on_its_way(values)))

    def readings(self, *, owed: int) -> list[Reading]:
        """Of the steps whose values have arrived, in order. Waits until those of at most `owed` are missing."""
        arrived: list[Reading] = []
        while self._waiting:
            batches, lr, values, event = self._waiting[0]
            if event is not None and not event.query():
                if len(self._waiting) <= owed:
                    break
                event.synchronize()
            arrived.append(Reading(batches, lr, *values.tolist()))
            self._waiting.popleft()
        return arrived

    def close(self) -> None:
        """End the thread. What was launched still ends."""
        self._prepared.close()

    def _on_its_way(self, values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the host, and the event after which it holds the values."""
        if self._device.type != "cuda":
            return values.clone(), None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        has_arrived = torch.cuda.Event()
        has_arrived.record()
        return host, has_arrived


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
