from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lora_diffusion.training.prefetch import Copier, Prefetcher


def test_items_come_in_order_and_then_end() -> None:
    with Prefetcher(range(20), depth=3) as items:
        assert list(items) == list(range(20))
        assert list(items) == []


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(failing()) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(items)


def test_closing_ends_the_thread_though_nobody_took_its_items() -> None:
    before = threading.active_count()
    items = Prefetcher(iter(int, 1), depth=1)
    next(items)
    items.close()

    assert threading.active_count() == before


def test_the_thread_stays_only_a_few_items_ahead() -> None:
    made: list[int] = []
    with Prefetcher((made.append(i) or i for i in range(100)), depth=2) as items:
        assert next(items) == 0
        assert len(made) <= 5  # the one taken, two that wait, one in the thread's hands, and one more in between


def test_copies_on_the_host_are_the_tensors() -> None:
    tensors = {"a": torch.arange(3)}

    assert torch.equal(Copier(torch.device("cpu")).start(tensors)()["a"], tensors["a"])
