"""The batch list: what every epoch holds, and that it depends on nothing but its arguments."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_diffusion.data.batches import BatchList, Draw
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.errors import DataError

WIDE, TALL, SQUARE = Bucket(96, 48), Bucket(48, 96), Bucket(64, 64)
BUCKETS = [SQUARE] * 9 + [WIDE] * 5 + [TALL]
IDS = [f"{index * 7919 % 100:016x}" for index in range(15)]
REPEATS = [1, 2, 1, 1, 3, 1, 1, 1, 1, 2, 1, 1, 1, 1, 4]


def make(batch_size: int = 4, seed: int = 1) -> BatchList:
    return BatchList(BUCKETS, IDS, REPEATS, batch_size, seed)


def epoch(batches: BatchList, number: int) -> list[tuple[Draw, ...]]:
    first = number * batches.batches_per_epoch
    return [batches.batch(index) for index in range(first, first + batches.batches_per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_every_picture_comes_once_per_repeat_in_every_epoch(batch_size: int):
    batches = make(batch_size)
    expected = {(sample, repeat) for sample, count in enumerate(REPEATS) for repeat in range(count)}
    for number in range(3):
        draws = [draw for batch in epoch(batches, number) for draw in batch]
        assert len(draws) == batches.num_draws_per_epoch == sum(REPEATS) == len(expected)
        assert {(draw.sample, draw.repeat) for draw in draws} == expected
        assert {draw.epoch for draw in draws} == {number}
        assert {draw.weight for draw in draws} == {1.0}


def test_batches_hold_one_bucket_and_only_the_last_of_a_bucket_is_short():
    groups = [(BUCKETS[batch[0].sample], batch) for batch in epoch(make(), 0)]
    assert all(BUCKETS[draw.sample] == bucket for bucket, batch in groups for draw in batch)
    lengths = Counter((bucket, len(batch)) for bucket, batch in groups)
    assert lengths == {(SQUARE, 4): 3, (WIDE, 4): 1, (WIDE, 2): 1, (TALL, 4): 1}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_shapes_are_those_of_an_epochs_batches(batch_size: int):
    batches = make(batch_size)
    assert batches.shapes == {(BUCKETS[batch[0].sample], len(batch)) for batch in epoch(batches, 1)}


def test_epochs_and_seeds_differ_in_members_and_in_order():
    plans = [epoch(make(seed=seed), number) for seed in (1, 2) for number in (0, 1)]
    members = [{frozenset((d.sample, d.repeat) for d in batch) for batch in plan} for plan in plans]
    orders = [[BUCKETS[batch[0].sample] for batch in plan] for plan in plans]
    assert all(members[i] != members[j] for i in range(4) for j in range(i))
    assert len({tuple(order) for order in orders}) > 1


def test_any_batch_can_be_asked_for_in_any_order():
    in_order = [make().batch(index) for index in range(30)]
    batches = make()
    assert [batches.batch(index) for index in reversed(range(30))] == in_order[::-1]
    assert make().batch(10**9) == make().batch(10**9)


def test_the_order_follows_the_ids_and_not_the_listing():
    turned = BatchList(BUCKETS[::-1], IDS[::-1], REPEATS[::-1], 4, 1)
    by_id = [[(IDS[d.sample], d.repeat) for d in make().batch(index)] for index in range(20)]
    assert [[(IDS[::-1][d.sample], d.repeat) for d in turned.batch(index)] for index in range(20)] == by_id


def test_the_first_batches_are_the_same_on_every_machine_and_version():
    """A change here changes every run's order: old checkpoints would resume with other pictures."""
    batches = BatchList([SQUARE] * 6, list("abcdef"), [1] * 6, 2, 42)
    assert [[d.sample for d in batches.batch(index)] for index in range(6)] == [
        # epoch 0, then epoch 1
        *[[1, 5], [4, 2], [0, 3]],
        *[[4, 3], [0, 5], [1, 2]],
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_the_shares_of_all_processes_together_are_the_batch(world: int):
    batches = make()
    for index in range(2 * batches.batches_per_epoch):
        shares = [batches.share(index, rank, world) for rank in range(world)]
        assert tuple(draw for share in shares for draw in share if draw.weight) == batches.batch(index)
        assert len({len(share) for share in shares}) == 1
        assert all(BUCKETS[draw.sample] == BUCKETS[shares[0][0].sample] for share in shares for draw in share)


def test_two_processes_with_batch_2_see_what_one_with_batch_4_sees():
    one, two = make(4), make(2 * 2)
    for index in range(one.batches_per_epoch):
        assert two.share(index, 0, 2) + two.share(index, 1, 2) == one.share(index, 0, 1)


def test_padding_weighs_nothing():
    batches = BatchList([SQUARE] * 3, list("abc"), [1] * 3, 4, 0)
    shares = [batches.share(0, rank, 2) for rank in range(2)]
    assert [[draw.weight for draw in share] for share in shares] == [[1.0, 1.0], [1.0, 0.0]]


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="no image"):
        BatchList([], [], [], 4, 0)
    with pytest.raises(DataError, match="batch_size"):
        BatchList([SQUARE], ["a"], [1], 0, 0)
