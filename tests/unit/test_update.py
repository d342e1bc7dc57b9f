"""The update that never looks at a value does what torch's clipping and AdamW do, and stops by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.streams import stream
from lora_diffusion.training.update import QuietUpdate

SHAPES = [(4, 3), (5,), (2, 2, 3)]
GOOD = torch.tensor(0.5)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=stream(0, "start", index))) for index, shape in enumerate(SHAPES)]


def adamw(of: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(of, lr=1e-2, weight_decay=0.01, fused=True)


def gradient(step: int, index: int, size: float) -> Tensor:
    return torch.randn(SHAPES[index], generator=stream(0, "gradient", step, index)) * size


def run(update: QuietUpdate, own: list[nn.Parameter], step: int, size: float = 1.0, loss: Tensor = GOOD) -> Tensor:
    update.zero_gradients()
    for index, parameter in enumerate(own):
        assert parameter.grad is not None
        parameter.grad.add_(gradient(step, index, size))
    return update.apply(loss)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_it_equals_clip_grad_norm_and_the_optimisers_step(max_norm: float) -> None:
    own, plain = parameters(), parameters()
    update, optimizer = QuietUpdate(adamw(own), own, max_norm), adamw(plain)
    for step in range(5):
        size = 10.0 ** (step - 3)  # both sides of the limit
        norm = run(update, own, step, size)
        for index, parameter in enumerate(plain):
            parameter.grad = gradient(step, index, size)
        expected = torch.nn.utils.clip_grad_norm_(plain, max_norm or float("inf"))
        optimizer.step()

        torch.testing.assert_close(norm, expected)  # the squares are added in another order
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # so the scale differs in its last bit


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_after_a_value_that_is_not_finite_nothing_changes_any_more(where: str, value: float) -> None:
    own = parameters()
    optimizer = adamw(own)
    update = QuietUpdate(optimizer, own, 1.0)
    run(update, own, 0)
    weights = [parameter.detach().clone() for parameter in own]
    state = copy.deepcopy(optimizer.state_dict())
    run(update, own, 1, value if where == "gradient" else 1.0, torch.tensor(value) if where == "loss" else GOOD)
    run(update, own, 2)

    assert update.broken == 1
    assert all(torch.equal(a, b) for a, b in zip(own, weights, strict=True))
    for index, before in state["state"].items():
        after = optimizer.state_dict()["state"][index]
        assert all(torch.equal(after[name], before[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_gradients_keep_their_addresses() -> None:
    own = parameters()
    update = QuietUpdate(adamw(own), own, 1.0)
    before = [parameter.grad.data_ptr() for parameter in own if parameter.grad is not None]
    run(update, own, 0)
    own[0].square().sum().backward()
    update.zero_gradients()

    assert [parameter.grad.data_ptr() for parameter in own if parameter.grad is not None] == before
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in own)


def test_an_optimiser_that_cannot_be_told_to_do_nothing_is_refused() -> None:
    own = parameters()

    with pytest.raises(ValueError, match="fused"):
        QuietUpdate(torch.optim.AdamW(own), own, 1.0)
