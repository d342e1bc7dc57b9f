"""Which pictures form which batch: a pure function of the seed, the pictures and the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.errors import DataError
from lora_diffusion.streams import stream

_NUM_PLANS = 2  # an optimiser step may begin in one epoch and end in the next


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of a picture in training.

    sample: its index. epoch: from 0. repeat: which of its repeats in this epoch, from 0.
    weight: 1.0, or 0.0 for one that only fills up a process's share.
    """

    sample: int
    epoch: int
    repeat: int
    weight: float = 1.0


class BatchList:
    """The endless list of batches of a run. `batch(i)` needs no `batch(i - 1)`, so resuming at `i` costs nothing.

    In each epoch every picture comes once per repeat. A batch holds pictures of one bucket; the last batch of a
    bucket may be short, and none is dropped. Pictures are shuffled within their bucket, then the batches among each
    other, anew in every epoch. The order depends on the pictures' `ids`, not on the order in which they are given.
    """

    def __init__(
        self, buckets: Sequence[Bucket], ids: Sequence[str], repeats: Sequence[int], batch_size: int, seed: int
    ) -> None:
        """One entry per picture in `buckets`, `ids` and `repeats`. batch_size: of all processes together."""
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
        if not sum(repeats):
            raise DataError("There is no image to train on.")
        self.batch_size = batch_size
        self.seed = seed
        members: dict[Bucket, list[tuple[int, int]]] = {}  # bucket -> (sample, repeat)
        for _, bucket, count, sample in sorted(zip(ids, buckets, repeats, range(len(ids)), strict=True)):
            members.setdefault(bucket, []).extend((sample, repeat) for repeat in range(count))
        self._members = {bucket: torch.tensor(members[bucket]) for bucket in sorted(members) if members[bucket]}
        self.num_draws_per_epoch = sum(map(len, self._members.values()))
        self.batches_per_epoch = sum(-(-len(draws) // batch_size) for draws in self._members.values())
        self._plans: dict[int, _Plan] = {}

    @property
    def shapes(self) -> set[tuple[Bucket, int]]:
        """(size of its pictures, their number) of every kind of batch in an epoch."""
        counts = {bucket: len(draws) for bucket, draws in self._members.items()}
        whole = {(bucket, self.batch_size) for bucket, count in counts.items() if count >= self.batch_size}
        return whole | {(bucket, rest) for bucket, count in counts.items() if (rest := count % self.batch_size)}

    def batch(self, index: int) -> tuple[Draw, ...]:
        """Batch `index` of the run, counted from 0 over all epochs: 1 to `batch_size` draws."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return tuple(Draw(sample, epoch, repeat) for sample, repeat in self._plan(epoch).batch(position))

    def share(self, index: int, rank: int, world: int) -> tuple[Draw, ...]:
        """The part of batch `index` that process `rank` of `world` computes.

        All shares of a batch together are the batch. They have the same length, as collective operations need it:
        a short one is filled up with draws of weight 0.
        """
        batch = self.batch(index)
        count = -(-len(batch) // world)
        share = batch[rank * count : (rank + 1) * count]
        return share + (replace(batch[0], weight=0.0),) * (count - len(share))

    def _plan(self, epoch: int) -> _Plan:
        """Made once per epoch: all else that a batch needs takes time by its own size, not by the data set's."""
        if epoch not in self._plans:
            while len(self._plans) >= _NUM_PLANS:
                del self._plans[max(self._plans, key=lambda other: abs(other - epoch))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        draws: list[Tensor] = []
        spans: list[tuple[int, int]] = []
        first = 0
        for bucket, members in self._members.items():
            generator = stream(self.seed, "batch-members", epoch, bucket.width, bucket.height)
            draws.append(members[torch.randperm(len(members), generator=generator)])
            end = first + len(members)
            spans += [(start, min(start + self.batch_size, end)) for start in range(first, end, self.batch_size)]
            first = end
        order = torch.randperm(len(spans), generator=stream(self.seed, "batch-order", epoch))
        return _Plan(torch.cat(draws), torch.tensor(spans)[order])


@dataclass(frozen=True)
class _Plan:
    """One epoch. draws: (N, 2), sample and repeat of each. spans: (batches, 2), where each lies in `draws`."""

    draws: Tensor
    spans: Tensor

    def batch(self, position: int) -> list[list[int]]:
        start, stop = self.spans[position].tolist()
        return self.draws[start:stop].tolist()
