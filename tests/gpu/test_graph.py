"""CUDA graphs of whole steps compute what single launches compute."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.streams import stream
from lora_diffusion.training.graph import MAX_GRAPHS, NUM_WARM_UPS, Inputs, StepGraphs
from lora_diffusion.training.quiet_step import QuietMember, QuietStep
from tests.training_runs import draw_pictures, prepare, write_config

pytestmark = pytest.mark.gpu


def make_step(device: torch.device) -> tuple[Tensor, StepGraphs]:
    """(what the steps have added up, the steps)."""
    total = torch.zeros((), device=device)

    def add(inputs: Inputs) -> None:
        total.add_(inputs["x"].square().sum())

    return total, StepGraphs(add, device)


def test_warm_ups_capture_and_replays_are_each_one_step() -> None:
    device = torch.device("cuda")
    total, steps = make_step(device)
    expected = 0.0
    for number in range(NUM_WARM_UPS + 4):
        steps({"x": torch.full((3,), float(number), device=device)})
        expected += 3 * number**2

    assert total.item() == expected
    assert steps.num_graphs == 1


def test_each_shape_has_a_graph_and_their_number_is_bounded() -> None:
    device = torch.device("cuda")
    total, steps = make_step(device)
    expected = 0
    for size in range(1, MAX_GRAPHS + 4):
        for _ in range(NUM_WARM_UPS + 2):
            steps({"x": torch.ones(size, device=device)})
            expected += size

    assert total.item() == expected
    assert steps.num_graphs == MAX_GRAPHS


def test_a_step_that_cannot_be_captured_is_run_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    seen: list[float] = []
    steps = StepGraphs(lambda inputs: seen.append(inputs["x"].sum().item()), device)  # a value on the host
    stream = torch.cuda.current_stream()
    for _ in range(NUM_WARM_UPS + 2):
        steps({"x": torch.ones(2, device=device)})

    assert seen == [2.0] * (NUM_WARM_UPS + 2)
    assert steps.num_graphs == 0 and "no CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == stream


def test_what_another_thread_does_while_a_graph_is_captured_is_no_part_of_it() -> None:
    device = torch.device("cuda")
    is_over = threading.Event()
    errors: list[Exception] = []

    def copy() -> None:
        """As the thread that makes batches: page-locked memory, memory on the device, events."""
        stream = torch.cuda.Stream(device)
        try:
            while not is_over.is_set():
                with torch.cuda.stream(stream):
                    torch.ones(2**18).pin_memory().to(device, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record(stream)
                event.query()
        except Exception as error:
            errors.append(error)

    total, steps = make_step(device)
    thread = threading.Thread(target=copy)
    thread.start()
    expected = 0
    for size in range(1, MAX_GRAPHS + 1):
        for _ in range(NUM_WARM_UPS + 2):
            steps({"x": torch.ones(size, device=device)})
            expected += size
    is_over.set()
    thread.join()

    assert errors == []
    assert steps.num_graphs == MAX_GRAPHS
    assert total.item() == expected


def test_where_memory_is_short_graphs_make_room_and_no_step_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    total = torch.zeros((), device=device)

    def add(inputs: Inputs) -> None:
        rows = inputs["x"].expand(-1, 2**26).clone()  # 256 MiB a row, which a graph keeps
        total.add_(rows.mean(1).sum())

    steps = StepGraphs(add, device)
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 5 * 2**28
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        for _ in range(NUM_WARM_UPS + 2):
            steps({"x": torch.ones(4, 1, device=device)})
        assert steps.num_graphs == 1
        for _ in range(2):
            steps({"x": torch.ones(3, 1, device=device)})  # fits, but not beside the graph
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert total.item() == 4 * (NUM_WARM_UPS + 2) + 3 * 2
    assert steps.num_graphs == 0 and "memory is short" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_of_graphs_learns_what_a_waiting_run_does(tiny_sd1: Path, tmp_path: Path, checkpointing: bool) -> None:
    adapters: list[dict[str, Tensor]] = []
    for launch in ("eager", "graph"):
        folder = tmp_path / launch
        folder.mkdir()
        run = {"steps": 12, "device": "cuda", "precision": "fp32"}
        config = write_config(
            folder / "run.toml",
            tiny_sd1,
            draw_pictures(folder / "pictures"),
            run=run,
            model={"gradient_checkpointing": checkpointing},
        )
        trainer = prepare(config)
        trainer.plan = replace(trainer.plan, launch=launch)
        adapters.append(load_file(trainer.fit()))

    for name, expected in adapters[0].items():  # kernels may add in another order; float16 in the file
        torch.testing.assert_close(adapters[1][name], expected, rtol=1e-2, atol=1e-4)


def test_learning_rates_are_read_when_a_graph_runs() -> None:
    device = torch.device("cuda")
    weight = nn.Parameter(torch.randn(4, generator=stream(0, "weight")).to(device))

    class Loss(nn.Module):
        def forward(self, batch: object, text: object) -> Tensor:
            return (weight * 1.0).sum().expand(1)

    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    member = QuietMember(Loss(), [], optimizer, [weight], 0.0)  # pyright: ignore[reportArgumentType]
    step = QuietStep({0: member}, JointLayout(), device, as_graph=True)
    fields = {
        "latents": (1, 4, 8, 8),
        "noise": (1, 4, 8, 8),
        "sizes": (1, 6),
        "weights": (1,),
        "text.hidden": (1, 2, 3),
    }
    inputs = {f"0.{name}": torch.ones(shape, device=device) for name, shape in fields.items()}
    inputs["0.timesteps"] = torch.ones(1, dtype=torch.long, device=device)

    def take_step(rate: float) -> None:
        member.set_rates([rate])
        step({0: inputs})

    for _ in range(NUM_WARM_UPS + 2):
        take_step(0.1)
    before = weight.detach().clone()
    take_step(0.0)
    assert torch.equal(weight, before)
    take_step(0.5)
    torch.testing.assert_close(before - weight, torch.full_like(weight, 0.5))  # Adam: a constant gradient moves by lr
