"""Optimisers lower a loss; the learning rate is a function of the step."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn

from lora_diffusion.training.optimizers import (
    OPTIMIZERS,
    OptimizerError,
    build_optimizer,
    learning_rate_curve,
    parameter_group,
    set_learning_rate,
)


def test_there_are_optimizers() -> None:
    assert {"adamw", "adamw8bit"} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_lowers_a_quadratic_or_names_the_missing_package(name: str) -> None:
    parameter = nn.Parameter(torch.full((64, 64), 2.0))
    package = OPTIMIZERS[name].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        with pytest.raises(OptimizerError, match=f"pip install {package}"):
            build_optimizer(name, [parameter_group([parameter], 0.1)])
        return
    optimizer = build_optimizer(name, [parameter_group([parameter], 0.1)])
    for _ in range(50):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.2


def test_adamw_equals_the_paper() -> None:
    """One step of Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, by hand."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    groups = [parameter_group([parameter], 0.1)]
    optimizer = build_optimizer("adamw", groups, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    gradient = torch.tensor([0.3, -4.0])
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    parameter.grad = gradient
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)  # float32 rounding


def test_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    factor = learning_rate_curve("constant", warmup_steps=4, steps=10)
    assert [round(factor(step), 3) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_cosine_falls_to_the_ratio_and_keeps_its_shape() -> None:
    """Loshchilov & Hutter 2017 (arXiv:1608.03983), equation 5: half-way it is half-way between the two rates."""
    factor = learning_rate_curve("cosine", warmup_steps=0, steps=100, min_lr_ratio=0.1)
    assert [factor(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75, 1)]
    )


def test_a_constant_rate_has_no_end_to_fall_to() -> None:
    factor = learning_rate_curve("constant", warmup_steps=0, steps=10, min_lr_ratio=0.1)
    assert {factor(step) for step in range(10)} == {1.0}


def test_linear_falls_in_a_line() -> None:
    factor = learning_rate_curve("linear", warmup_steps=0, steps=10)
    assert [factor(step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])


def test_groups_keep_their_own_peak() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer("adamw", [parameter_group([a], 1e-3), parameter_group([b], 2e-4)])
    for factor in (0.5, 0.25):  # factors are of the peak, not of each other
        set_learning_rate(optimizer, factor, step=0)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 * factor, 2e-4 * factor]
