"""What tests on a GPU share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from lora_diffusion.training.graph import StepGraphs
from tests.conftest import DEVICE


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps one state per process, in which the precision of the first training stays."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the test runs; the memory of the tests before is given back."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    yield torch.device(DEVICE)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The number of graphs of each training in the test that launches its steps as graphs."""
    made: list[StepGraphs] = []
    init = StepGraphs.__init__

    def watched(steps: StepGraphs, *arguments: object) -> None:
        init(steps, *arguments)  # pyright: ignore[reportArgumentType]
        made.append(steps)

    monkeypatch.setattr(StepGraphs, "__init__", watched)
    return lambda: [steps.num_graphs for steps in made]
