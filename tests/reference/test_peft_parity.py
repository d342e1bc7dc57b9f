"""Our LoRA against PEFT's: the same factors must give the same outputs and the same gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Layer
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.streams import stream

LAYERS = ("linear", "linear-no-bias", "conv1x1", "conv3x3", "conv3x3-stride2")
layers = pytest.mark.parametrize("layer", LAYERS)
alphas = pytest.mark.parametrize("alpha", [8, 3])


def make_layer(name: str) -> Layer:
    layer: Layer
    if name.startswith("linear"):
        layer = nn.Linear(24, 40, bias=name == "linear")
    elif name == "conv1x1":
        layer = nn.Conv2d(24, 40, 1)
    else:
        layer = nn.Conv2d(24, 40, 3, stride=2 if name.endswith("stride2") else 1, padding=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05, generator=stream(0, "base", parameter.ndim))
    return layer


def make_input(layer: Layer) -> Tensor:
    shape = (2, 9, 24) if isinstance(layer, nn.Linear) else (2, 24, 8, 8)
    return torch.randn(shape, generator=stream(0, "x"))


def make_pair(name: str, alpha: float, init: bool | str = True) -> tuple[LoRA, nn.Module]:
    """Ours and PEFT's on equal bases, with equal factors that are both away from 0."""
    config = peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    with torch.random.fork_rng():  # PEFT's start draws from the global generator
        theirs = peft.inject_adapter_in_model(config, nn.Sequential(make_layer(name)))[0]
    ours = LoRA(make_layer(name), 8, alpha)
    for mine, other, which in (
        (ours.lora_down.weight, theirs.lora_A["default"].weight, "down"),
        (ours.lora_up.weight, theirs.lora_B["default"].weight, "up"),
    ):
        nn.init.normal_(mine, std=0.1, generator=stream(0, which))
        with torch.no_grad():
            other.copy_(mine)
    return ours, theirs


@layers
@alphas
def test_outputs_agree(layer: str, alpha: float) -> None:
    ours, theirs = make_pair(layer, alpha)
    x = make_input(ours.base)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours(x), ours.base(x), atol=0.01)


@layers
@alphas
def test_gradients_agree(layer: str, alpha: float) -> None:
    ours, theirs = make_pair(layer, alpha)
    x = make_input(ours.base)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(inputs[0]).square().mean().backward()
    theirs(inputs[1]).square().mean().backward()
    pairs = (
        (ours.lora_down.weight.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_up.weight.grad, theirs.lora_B["default"].weight.grad),
        (inputs[0].grad, inputs[1].grad),
    )
    for mine, other in pairs:
        assert mine is not None and mine.any()
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@layers
@alphas
def test_weight_changes_agree(layer: str, alpha: float) -> None:
    ours, theirs = make_pair(layer, alpha)
    torch.testing.assert_close(ours.delta(), theirs.get_delta_weight("default"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("init", "theirs_init"), [("default", True), ("gaussian", "gaussian")])
def test_starts_have_the_same_spread(init: str, theirs_init: bool | str) -> None:
    config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=theirs_init)
    with torch.random.fork_rng():
        theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(2048, 8)))[0]
    ours = LoRA(nn.Linear(2048, 8, device="meta").to_empty(device="cpu"), 16, 16, init=init)
    # 32,768 numbers each: standard error 0.4 %
    spread = ours.lora_down.weight.std().item()
    assert spread == pytest.approx(theirs.lora_A["default"].weight.std().item(), rel=0.03)
    assert not ours.lora_up.weight.any() and not theirs.lora_B["default"].weight.any()
