from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.initialise import INITS
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.errors import UserError
from lora_diffusion.streams import stream


def linear() -> nn.Linear:
    layer = nn.Linear(10, 14, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream(0, "base", parameter.ndim)))
    return layer


def conv(kernel: int = 3, **options: int | str) -> nn.Conv2d:
    layer = nn.Conv2d(10, 14, kernel, **options, device="meta").to_empty(device="cpu")  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream(0, "base", parameter.ndim)))
    return layer


def trained(lora: LoRA) -> LoRA:
    with torch.no_grad():
        lora.lora_up.weight.copy_(torch.randn(lora.lora_up.weight.shape, generator=stream(0, "up")))
    return lora


@pytest.mark.parametrize(
    ("base", "down", "up"),
    [
        (linear(), (4, 10), (14, 4)),
        (conv(1), (4, 10, 1, 1), (14, 4, 1, 1)),
        (conv(3, padding=1), (4, 10, 3, 3), (14, 4, 1, 1)),
    ],
)
def test_factors_have_the_shapes_of_kohya_files(base: nn.Linear | nn.Conv2d, down: tuple, up: tuple) -> None:
    tensors = LoRA(base, 4, 8.0).tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": (),
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["alpha"] == 8.0


def test_parameter_names_are_the_names_in_the_file() -> None:
    lora = LoRA(linear(), 4, 8.0)
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == {"lora_down.weight", "lora_up.weight"}


def test_delta_is_alpha_over_rank_times_up_times_down() -> None:
    lora = trained(LoRA(linear(), 4, 2.0))
    expected = 2.0 / 4 * lora.lora_up.weight @ lora.lora_down.weight
    torch.testing.assert_close(lora.delta(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same"},
    ],
)
def test_down_convolves_as_the_base_does(options: dict[str, int | str]) -> None:
    base = conv(3, **options)
    lora = trained(LoRA(base, 4, 4.0))
    x = torch.randn((2, 10, 9, 9), generator=stream(0, "x"))
    expected = base(x)
    with torch.no_grad():
        base.weight += lora.delta()
        merged = base(x)
        base.weight -= lora.delta()
    torch.testing.assert_close(lora(x), merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, expected, atol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for use_checkpoint in (False, True):
        lora = trained(LoRA(linear().to(torch.bfloat16), 4, 4.0, generator=stream(0, "init")))
        x = torch.randn((3, 10), generator=stream(0, "x")).to(torch.bfloat16).requires_grad_()
        output = checkpoint(lora, x, use_reentrant=False) if use_checkpoint else lora(x)
        output.float().square().sum().backward()
        gradients.append((x.grad, lora.lora_down.weight.grad, lora.lora_up.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_small_updates_survive_on_a_bfloat16_base() -> None:
    lora = LoRA(linear().to(torch.bfloat16), 4, 4.0)
    with torch.no_grad():
        lora.lora_down.weight.fill_(1.0).add_(1e-4)  # bfloat16 rounds 1.0001 to 1
    assert (lora.lora_down.weight > 1).all()


def test_default_start_is_uniform_within_one_over_sqrt_fan_in() -> None:
    down, up = torch.empty(64, 16, 3, 3), torch.ones(8, 64, 1, 1)
    INITS["default"].fill(down, up, down, 1.0, stream(0, "init"))
    bound = 1 / math.sqrt(16 * 9)
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not up.any()


def test_gaussian_start_has_standard_deviation_one_over_rank() -> None:
    down, up = torch.empty(8, 4096), torch.ones(8, 8)
    INITS["gaussian"].fill(down, up, down, 1.0, stream(0, "init"))
    assert down.std() == pytest.approx(1 / 8, rel=0.02)
    assert not up.any()


def test_from_tensors_without_alpha_has_scale_one() -> None:
    lora = LoRA(linear(), 4, 2.0)
    tensors = {name: t.clone() for name, t in lora.tensors().items() if name != "alpha"}
    assert LoRA.from_tensors(linear(), tensors).scale == 1.0


def test_from_tensors_reads_half_precision_into_float32() -> None:
    tensors = {name: tensor.half() for name, tensor in trained(LoRA(linear(), 4, 2.0)).tensors().items()}
    lora = LoRA.from_tensors(linear().to(torch.bfloat16), tensors)
    assert lora.lora_up.weight.dtype == torch.float32
    assert torch.equal(lora.lora_up.weight, tensors["lora_up.weight"].float())


def test_factors_of_a_linear_layer_suit_a_1x1_convolution() -> None:
    tensors = trained(LoRA(linear(), 4, 2.0)).tensors()
    lora = LoRA.from_tensors(conv(1), tensors)
    assert torch.equal(lora.delta().flatten(1), LoRA.from_tensors(linear(), tensors).delta())


def test_from_tensors_names_the_wrong_shape() -> None:
    tensors = LoRA(nn.Linear(11, 14, device="meta").to_empty(device="cpu"), 4, 2.0).tensors()
    with pytest.raises(UserError, match=r"made for a layer of 14 x 11; this layer needs 14 x 10"):
        LoRA.from_tensors(linear(), tensors)


def test_from_tensors_refuses_another_kind() -> None:
    tensors = {**LoRA(linear(), 4, 2.0).tensors(), "dora_scale": torch.ones(1, 10)}
    with pytest.raises(UserError, match="dora_scale"):
        LoRA.from_tensors(linear(), tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "rank is 0"), ({"rank": 4, "init": "magic"}, "'magic'.*default, gaussian")],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(linear(), alpha=1.0, **arguments)


def test_grouped_convolution_is_refused() -> None:
    base = nn.Conv2d(8, 8, 3, groups=2, device="meta")
    with pytest.raises(ValueError, match="2 groups"):
        LoRA(base, 4, 4.0)
