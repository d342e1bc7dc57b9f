"""A recorded step is the step: what it changes, what it keeps in memory, and what cannot be recorded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.training.graph import Inputs
from lora_diffusion.training.recording import NUM_WARM_UPS, StepRecordings

NUM_CALLS = NUM_WARM_UPS + 4  # of which one is recorded and three are replayed


class Counted:
    """A step that counts how often it is called from Python."""

    def __init__(self, step: Callable[[Inputs], None]) -> None:
        self.step = step
        self.num_calls = 0

    def __call__(self, inputs: Inputs) -> None:
        self.num_calls += 1
        self.step(inputs)


def values(make: Callable[[], tuple[Tensor, Callable[[Inputs], None]]], *, recorded: bool) -> list[Tensor]:
    """What the step's tensor is after each call, with other inputs each time."""
    tensor, step = make()
    run = StepRecordings(Counted(step)) if recorded else step
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_CALLS):
        run({"x": torch.randn(4, 6, generator=generator), "y": torch.randn(6, generator=generator)})
        found.append(tensor.clone())
    if isinstance(run, StepRecordings):
        assert run.num_recordings == 1
        assert isinstance(run._step, Counted) and run._step.num_calls == NUM_WARM_UPS + 1
    return found


def adds_up() -> tuple[Tensor, Callable[[Inputs], None]]:
    total = torch.zeros(())

    def step(inputs: Inputs) -> None:
        total.add_(inputs["x"].square().sum())

    return total, step


def writes_into_views() -> tuple[Tensor, Callable[[Inputs], None]]:
    """Of its own memory, of memory that stays and of an input."""
    kept = torch.zeros(3, 4)

    def step(inputs: Inputs) -> None:
        made = inputs["x"] * 2
        made.T[1:3].t_().fill_(7)
        left, right = made.split([2, 4], dim=1)
        kept[1:].T[:, 0].add_(left[:, 1]).sub_(right.unbind(1)[2])
        kept.view(-1)[2::5].copy_(inputs["y"][:2])
        inputs["x"][0].zero_()
        kept[0].mul_(inputs["x"].reshape(6, 4)[0] + 0.5)

    return kept, step


def makes_several() -> tuple[Tensor, Callable[[Inputs], None]]:
    kept = torch.zeros(2, 6)

    def step(inputs: Inputs) -> None:
        found, places = inputs["x"].max(dim=0)
        kept[0].copy_(found)
        kept[1].copy_(places)
        parts = torch.ops.aten._foreach_mul.ScalarList([kept[0], kept[1]], [2.0, float("inf")])
        torch.ops.aten._foreach_add_.List([kept[0], kept[1]], parts, alpha=0.25)
        kept.nan_to_num_(posinf=3.0)

    return kept, step


class Doubled(torch.autograd.Function):
    """Saves a view of what it is given, and an own result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squared = x * x
        ctx.save_for_backward(x[:, ::2], squared)
        return squared * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        part, squared = ctx.saved_tensors
        grad = grads[0] * squared
        grad[:, ::2] += part
        return grad


def trains() -> tuple[Tensor, Callable[[Inputs], None]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)

    def step(inputs: Inputs) -> None:
        hidden = Doubled.apply(model[:2](inputs["x"]))
        assert isinstance(hidden, Tensor)
        (model[2:](hidden * inputs["y"]).square().mean() + hidden.logsumexp(0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()  # to None: the next backward pass makes gradients anew

    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    return weight.detach(), step


@pytest.mark.parametrize("make", [adds_up, writes_into_views, makes_several, trains])
def test_it_does_what_the_step_does(make: Callable[[], tuple[Tensor, Callable[[Inputs], None]]]) -> None:
    expected, found = (values(make, recorded=recorded) for recorded in (False, True))
    assert not torch.equal(expected[-1], expected[-2])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_each_shape_has_a_recording_until_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_diffusion.training.recording.MAX_OPERATIONS", 20)
    total, step = adds_up()
    steps = StepRecordings(step)
    expected = 0
    for size in range(1, 40):
        for _ in range(NUM_CALLS):
            steps({"x": torch.ones(size)})
            expected += size

    assert total.item() == expected
    each = steps.num_operations // steps.num_recordings
    assert 20 <= steps.num_operations < 20 + each  # all of them are of one length


def looks_at_a_value(inputs: Inputs) -> Tensor:
    return inputs["x"] * (2.0 if inputs["x"].sum() > 0 else 3.0)


def reads_other_numbers(inputs: Inputs) -> Tensor:
    return (inputs["x"] * 2).view(torch.int32).bitwise_and(1).float()


@pytest.mark.parametrize("compute", [looks_at_a_value, reads_other_numbers])
def test_a_step_that_cannot_be_recorded_is_run_all_the_same(
    compute: Callable[[Inputs], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Tensor] = []
    steps = StepRecordings(lambda inputs: seen.append(compute(inputs)))
    given = [torch.full((2,), (-1.0) ** number * number) for number in range(NUM_CALLS)]
    for x in given:
        steps({"x": x})

    assert all(torch.equal(a, compute({"x": x})) for a, x in zip(seen, given, strict=True))
    assert steps.num_recordings == 0
    assert [record.message.count("without a recording") for record in caplog.records] == [1]


class Watch(TorchDispatchMode):
    """How many tensors of 1000 numbers made inside live at once, before each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.seen: list[StorageWeakRef] = []

    def num_alive(self) -> int:
        return len({known.cdata for known in self.seen if not known.expired()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.most = max(self.most, self.num_alive())
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 1000:
            self.seen.append(StorageWeakRef(result.untyped_storage()))
        return result


def test_a_tensor_goes_with_its_last_use() -> None:
    total = torch.zeros(())

    def step(inputs: Inputs) -> None:
        x = inputs["x"]
        for _ in range(20):
            x = x.add(1).view(10, 100).mul(2).view(-1)
        total.add_(x.sum())

    steps, inputs = StepRecordings(step), {"x": torch.ones(1000)}
    for _ in range(NUM_WARM_UPS + 1):
        steps(inputs)
    with Watch() as watch:
        steps(inputs)
    assert steps.num_recordings == 1 and len(watch.seen) >= 40
    assert watch.most <= 2  # the input and what is read


def test_a_replay_that_fails_keeps_nothing_and_may_be_followed_by_another() -> None:
    total = torch.zeros(())

    def step(inputs: Inputs) -> None:
        x = inputs["x"] + 1
        total.add_(torch.linalg.cholesky(inputs["matrix"]).sum())  # an error where it is not positive
        total.add_(x.sum())

    def inputs_of(sign: float) -> Inputs:
        return {"x": torch.ones(1000), "matrix": torch.eye(2) * sign}

    steps = StepRecordings(step)
    for _ in range(NUM_WARM_UPS + 1):
        steps(inputs_of(1))
    bad = inputs_of(-1)
    with Watch() as watch:
        with pytest.raises(RuntimeError, match="positive-definite"):
            steps(bad)
        assert watch.most == 2 and watch.num_alive() == 1  # the copy of the input stays
    steps(inputs_of(1))
    assert steps.num_recordings == 1 and total.item() == (NUM_WARM_UPS + 2) * 2002


def test_what_another_thread_does_meanwhile_is_no_part_of_it() -> None:
    total, other = torch.zeros(()), torch.zeros(())
    is_over, has_begun = threading.Event(), threading.Event()

    def count() -> None:
        while not is_over.is_set():
            other.add_(1)
            has_begun.set()

    def step(inputs: Inputs) -> None:
        has_begun.clear()
        has_begun.wait(10)
        total.add_(inputs["x"].sum())

    steps = StepRecordings(step)
    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(NUM_WARM_UPS + 1):
        steps({"x": torch.ones(3)})
    is_over.set()
    thread.join()
    before = other.item()
    steps({"x": torch.ones(3)})
    assert steps.num_recordings == 1
    assert (total.item(), other.item()) == (3 * (NUM_WARM_UPS + 2), before)


def test_garbage_is_collected_again_after_a_recording() -> None:
    steps = StepRecordings(adds_up()[1])
    for _ in range(NUM_CALLS):
        steps({"x": torch.ones(3)})
    assert steps.num_recordings == 1 and gc.isenabled()
