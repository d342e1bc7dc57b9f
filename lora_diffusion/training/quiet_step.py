"""The optimiser step without a look at any value: so it can be launched as a whole, on a GPU and on a CPU.

It computes what `Trainer` computes eagerly, for one training or for several that share the base. Values for the log
arrive some steps late; a loss that is not finite is noticed as late, but has changed nothing (see `QuietUpdate`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.graph import StepGraphs
from lora_diffusion.training.prefetch import Copier, Prefetcher
from lora_diffusion.training.recording import StepRecordings
from lora_diffusion.training.shares import Share, joint_losses, of_equal_shapes
from lora_diffusion.training.step import DenoisingLoss
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


class QuietMember:
    """What a step trains: one adapter, by its own loss, clipping and optimiser."""

    def __init__(
        self,
        loss: DenoisingLoss,
        adapters: Iterable[nn.Module],
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        max_norm: float,
    ) -> None:
        """adapters: in the model of `loss` or joined into it. optimizer: fused AdamW over `parameters`."""
        self.loss = loss
        self.device = parameters[0].device
        self._optimizer = optimizer
        for group in optimizer.param_groups:  # read by the graph when it runs, and so a tensor
            group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
            group["capturable"] = self.device.type == "cuda"
        self._copies = WorkingCopies(loss, adapters)
        copied = set(map(id, self._copies.parameters))
        rest = [parameter for parameter in parameters if id(parameter) not in copied]
        self._update = QuietUpdate(optimizer, [*self._copies.parameters, *rest], max_norm)
        self.values = torch.zeros(2, device=self.device)
        """(loss, norm of the gradients) of the last step, on the device, until the next one."""

    def set_rates(self, rates: Sequence[float]) -> None:
        """rates: the learning rate of each parameter group in the next step."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Inside are the forward and backward passes of one step. Each is followed by `gather`."""
        self._update.zero_gradients()
        self.values.zero_()
        with self._copies:
            yield

    def gather(self, loss: Tensor) -> None:
        """loss: what the backward pass came from, detached."""
        self._copies.gather(self._update.gradients)
        self.values[0].add_(loss)

    def update(self) -> None:
        self.values[1].copy_(self._update.apply(self.values[0]))


class QuietStep:
    """One optimiser step of all members as a function of tensors: gradients of all micro-batches, clipping, updates."""

    def __init__(
        self, members: Mapping[int, QuietMember], layout: JointLayout, device: torch.device, *, as_graph: bool
    ) -> None:
        """members: by number in `layout`. device: where their parameters are.

        as_graph: replay CUDA graphs, one per shape of the inputs, or recordings on a CPU; False launches every
        operation.
        """
        self._members = members
        self._layout = layout
        self._device = device
        self._as_graph = as_graph
        self._present: set[int] = set()
        self._whole: Callable[[Mapping[str, Tensor]], None] | None = None

    def __call__(self, inputs: Mapping[int, Mapping[str, Tensor]]) -> None:
        """A step of the members whose inputs are given, see `inputs_of` and `inputs_of_texts`. Others may have left."""
        if self._as_graph and self._present != inputs.keys():
            # Every graph has a part of each member in it: when one has left, none is of use any more.
            self._present, self._whole = set(inputs), self._launcher()
        launch = self._whole or self._step
        launch({f"{number}.{name}": tensor for number, own in inputs.items() for name, tensor in own.items()})

    def _launcher(self) -> StepRecordings | StepGraphs:
        """It does not keep this object: so its memory is free as soon as this is no longer used."""
        method = WeakMethod(self._step)

        def step(inputs: Mapping[str, Tensor]) -> None:
            run = method()
            assert run is not None
            run(inputs)

        if self._device.type == "cpu":
            return StepRecordings(step)
        torch.cuda.synchronize(self._device)
        return StepGraphs(step, self._device)

    def _step(self, inputs: Mapping[str, Tensor]) -> None:
        by_index: dict[int, list[Share]] = {}
        for number, index in _micro_batches(inputs):
            batch, text = _batch_of(inputs, f"{number}.{index}")
            by_index.setdefault(index, []).append(Share(number, self._members[number].loss, batch, text))
        present = [self._members[share.number] for share in by_index[0]]
        with ExitStack() as stack:
            for member in present:
                stack.enter_context(member.passes())
            for shares in by_index.values():
                for group in of_equal_shapes(shares):
                    self._backward(group)
        for member in present:
            member.update()

    def _backward(self, group: Sequence[Share]) -> None:
        with self._layout.divided([(share.number, share.num_rows) for share in group]):
            losses = joint_losses(group)  # (B,) each
            parts = [(own * share.batch.weights).sum() for own, share in zip(losses, group, strict=True)]
            torch.autograd.backward(parts)
        for share, part in zip(group, parts, strict=True):
            self._members[share.number].gather(part.detach())


def inputs_of(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The tensors of one step's micro-batches, by index and name: "0.latents", "1.noise", …"""
    return {f"{index}.{name}": getattr(batch, name) for index, batch in enumerate(batches) for name in _FIELDS}


def inputs_of_texts(texts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Theirs, and their captions' encodings are a step's inputs: "0.text.hidden", …"""
    return {f"{i}.text.{name}": tensor for i, text in enumerate(texts) for name, tensor in text.texts().items()}


def _micro_batches(inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(number of the member, index of the micro-batch) of all, the first of each member first."""
    names = (name.split(".") for name in inputs if name.endswith(".latents"))
    return sorted(((int(number), int(index)) for number, index, _ in names), key=lambda place: place[::-1])


def _batch_of(inputs: Mapping[str, Tensor], place: str) -> tuple[Batch, Conditioning]:
    batch = Batch(**{name: inputs[f"{place}.{name}"] for name in _FIELDS}, captions=(), names=())
    pooled = inputs.get(f"{place}.text.pooled")
    return batch, Conditioning(inputs[f"{place}.text.hidden"], pooled)


class QuietLoop:
    """One member's side of quiet steps: batches that a thread makes ahead, and later what came of each step."""

    def __init__(
        self,
        member: QuietMember,
        batches: Iterator[Batch],
        accumulation: int,
        texts: Callable[[Sequence[str]], Conditioning],
    ) -> None:
        """batches: micro-batches, on the host. texts: captions → their encoding, on the device."""
        self.member = member
        self._texts = texts
        self._next: tuple[Sequence[Batch], float] | None = None
        self._waiting: deque[tuple[Sequence[Batch], float, Tensor, torch.cuda.Event | None]] = deque()
        copier = Copier(member.device)

        def prepared() -> Iterator[tuple[list[Batch], Callable[[], dict[str, Tensor]]]]:
            # Sorted, for each order of sizes would be a shape of its own to record; the sum is the same.
            while micro_batches := sorted(islice(batches, accumulation), key=lambda batch: batch.latents.shape):
                yield micro_batches, copier.start(inputs_of(micro_batches))

        self._prepared = Prefetcher(prepared())

    def next_inputs(self, rates: Sequence[float]) -> dict[str, Tensor]:
        """Of the next step. rates: its learning rate of each parameter group."""
        micro_batches, take = next(self._prepared)
        texts = inputs_of_texts([self._texts(batch.captions) for batch in micro_batches])
        self.member.set_rates(rates)
        self._next = micro_batches, rates[0]
        return take() | texts

    def launched(self) -> None:
        """The step has been launched: its values are on their way."""
        assert self._next is not None
        self._waiting.append((*self._next, *_on_its_way(self.member.values)))
        self._next = None

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

    def wait(self) -> None:
        """Until what was launched has been computed."""
        for *_, event in self._waiting:
            if event is not None:
                event.synchronize()

    def close(self) -> None:
        """End the thread. What was launched still ends."""
        self._prepared.close()


def _on_its_way(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it holds the values."""
    if not values.is_cuda:
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    has_arrived = torch.cuda.Event()
    has_arrived.record()
    return host, has_arrived


class ResidentTexts:
    """Embeddings of captions that stay on the device, up to a size in all; the least recently used go first."""

    def __init__(self, get: Callable[[str], Mapping[str, Tensor]], device: torch.device, budget_bytes: int) -> None:
        """get: a caption's tensors on the host, without a batch dimension (`TextCache.get`).

        On a CPU nothing is kept here: they would be the ones that the cache itself keeps, or has let go.
        """
        self._get = get
        self._device = device
        self._free_bytes = 0 if device.type == "cpu" else budget_bytes
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
