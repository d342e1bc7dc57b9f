"""Which pictures form which batch: a pure function of the seed, the pictures and the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.errors import DataError
from lora_diffusion.streams import stream


@dataclass(frozen=True)
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
        self._members: dict[Bucket, list[tuple[int, int]]] = {}  # bucket -> (sample, repeat)
        order = sorted(zip(ids, buckets, repeats, range(len(ids)), strict=True))
        for _, bucket, count, sample in order:
            self._members.setdefault(bucket, []).extend((sample, repeat) for repeat in range(count))
        self.num_draws_per_epoch = sum(map(len, self._members.values()))
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._members.values())
        self._epoch: tuple[int, list[tuple[Draw, ...]]] | None = None

    def batch(self, index: int) -> tuple[Draw, ...]:
        """Batch `index` of the run, counted from 0 over all epochs: 1 to `batch_size` draws."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        return self._epoch[1][position]

    def share(self, index: int, rank: int, world: int) -> tuple[Draw, ...]:
        """The part of batch `index` that process `rank` of `world` computes.

        All shares of a batch together are the batch. They have the same length, as collective operations need it:
        a short one is filled up with draws of weight 0.
        """
        batch = self.batch(index)
        count = -(-len(batch) // world)
        share = batch[rank * count : (rank + 1) * count]
        return share + (replace(batch[0], weight=0.0),) * (count - len(share))

    def _plan(self, epoch: int) -> list[tuple[Draw, ...]]:
        batches: list[tuple[Draw, ...]] = []
        for bucket in sorted(self._members):
            members = self._members[bucket]
            generator = stream(self.seed, "batch-members", epoch, bucket.width, bucket.height)
            shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            draws = [Draw(sample, epoch, repeat) for sample, repeat in shuffled]
            batches += [tuple(draws[i : i + self.batch_size]) for i in range(0, len(draws), self.batch_size)]
        order = torch.randperm(len(batches), generator=stream(self.seed, "batch-order", epoch))
        return [batches[i] for i in order.tolist()]
