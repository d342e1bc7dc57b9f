"""What quiet steps are given: micro-batches in an order of their own, and texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.models.base import Conditioning
from lora_diffusion.training.batches import Batch
from lora_diffusion.training.graph import shape_of
from lora_diffusion.training.quiet_step import QuietLoop, ResidentTexts

CPU = torch.device("cpu")


def batch(height: int, width: int, mark: float) -> Batch:
    latents = torch.full((1, 4, height, width), mark)
    ones = torch.ones(1)
    return Batch(latents, latents, ones.long(), ones, torch.ones(1, 6), captions=("a",), names=("a.png",))


def test_steps_of_the_same_sizes_in_another_order_have_one_shape() -> None:
    batches = [batch(8, 4, 1), batch(4, 8, 2), batch(4, 8, 3), batch(8, 4, 4)]
    member: Any = SimpleNamespace(device=CPU, set_rates=lambda _: None)
    loop = QuietLoop(member, iter(batches), 2, lambda _: Conditioning(torch.zeros(1, 7, 8)))
    try:
        first, second = loop.next_inputs([1.0]), loop.next_inputs([1.0])
    finally:
        loop.close()

    assert shape_of(first) == shape_of(second)
    marks = [{inputs[f"{index}.latents"][0, 0, 0, 0].item() for index in range(2)} for inputs in (first, second)]
    assert marks == [{1.0, 2.0}, {3.0, 4.0}], "no picture moves to another step"


def test_on_a_cpu_only_the_cache_keeps_texts() -> None:
    asked: list[str] = []

    def get(caption: str) -> dict[str, Tensor]:
        asked.append(caption)
        return {"hidden": torch.zeros(7, 8)}

    texts = ResidentTexts(get, CPU, 2**30)
    for captions in (["a", "b"], ["a", "b"]):
        assert cast("Tensor", texts(captions).hidden).shape == (2, 7, 8)
    assert asked == ["a", "b", "a", "b"]
