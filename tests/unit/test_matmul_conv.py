"""Convolutions as matrix products, against torch's own in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.models.load import load_model
from lora_diffusion.models.matmul_conv import MatmulConv2d, multiply_convolutions

FLOAT32 = 2**-24


class Recorder(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    generator = torch.Generator().manual_seed(inputs + outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (inputs * kernel**2) ** 0.5)
    return layer.requires_grad_(False)


def picture(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operations(layer: nn.Module, x: Tensor) -> list[str]:
    with Recorder() as recorder:
        layer(x)
    return recorder.names


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [
        (3, 1, (1, 96, 5, 3)),
        (3, 1, (3, 96, 4, 6)),
        (3, 2, (2, 96, 7, 6)),
        (1, 1, (2, 96, 4, 2)),
        (3, 1, (1, 96, 12, 9)),
        (3, 2, (1, 96, 17, 30)),
        (3, 1, (2, 96, 2, 3)),
        (3, 2, (1, 96, 3, 4)),
        (1, 1, (1, 96, 3, 3)),
    ],
    ids=["one", "batch", "halved", "1x1", "large", "large, halved", "few", "few, halved", "1x1 few"],
)
def test_output_and_gradient_are_those_of_the_plain_layer(
    kernel: int, stride: int, shape: tuple[int, ...], bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MatmulConv2d, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(MatmulConv2d, "MIN_WEIGHTS_OF_FEW", 1)
    layer = convolution(96, 96, kernel, stride, bias=bias)
    multiply_convolutions(layer)
    x = picture(*shape).requires_grad_()
    exact_bias = None if layer.bias is None else layer.bias.double()
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), exact_bias, stride, kernel // 2)
    grad_output = picture(*exact.shape, seed=2)
    (exact_grad,) = torch.autograd.grad(exact, x, grad_output.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = layer(x)
        (grad,) = torch.autograd.grad(output, x, grad_output)
    finally:
        torch.set_num_threads(before)
    # sums of up to 864 numbers with a spread of 1 in all, in float32
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=100 * FLOAT32)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=0, atol=100 * FLOAT32)


def test_it_is_a_product_where_weights_are_many_for_the_pixels() -> None:
    layer = convolution(320, 384)
    assert layer.weight.numel() > MatmulConv2d.MIN_WEIGHTS
    multiply_convolutions(layer)
    assert operations(layer, picture(1, 320, 12, 8)) == ["_slow_conv2d_forward.default"]  # 4 channels per pixel
    assert operations(layer, picture(1, 320, 12, 9)) == ["convolution.default"]  # 3.6
    assert operations(layer, picture(2, 320, 12, 9)) == ["convolution.default"], "the batch does not count"
    for few_or_several in (picture(2, 320, 12, 8), picture(1, 320, 3, 5)):
        assert operations(layer, few_or_several).count("mm.default") == 1, "one product for all"


def test_of_medium_weights_it_is_a_product_for_one_picture_of_few_pixels_only() -> None:
    layer = convolution(192, 192)
    assert MatmulConv2d.MIN_WEIGHTS > layer.weight.numel() > MatmulConv2d.MIN_WEIGHTS_OF_FEW
    multiply_convolutions(layer)
    assert "mm.default" in operations(layer, picture(1, 192, 3, 5))
    assert operations(layer, picture(1, 192, 4, 4)) == ["convolution.default"]
    assert operations(layer, picture(2, 192, 3, 2)) == ["convolution.default"]


def test_small_weights_stay_with_torch() -> None:
    layer = convolution(64, 64)
    multiply_convolutions(layer)
    assert operations(layer, picture(1, 64, 1, 1)) == ["convolution.default"]


def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    layer = convolution(384, 384).requires_grad_()
    multiply_convolutions(layer)
    layer(picture(2, 384, 2, 2)).square().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_layers_stay_the_same_objects_with_the_same_weights() -> None:
    root = nn.Sequential(convolution(8, 8), nn.Linear(2, 2))
    layer, weight = root[0], root[0].weight
    multiply_convolutions(root)
    multiply_convolutions(root)
    assert root[0] is layer and layer.weight is weight
    assert [type(module) for module in root] == [MatmulConv2d, nn.Linear]
    assert list(root.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    "layer",
    [
        convolution(8, 8).bfloat16(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
    ],
    ids=["bfloat16", "padding mode", "groups", "dilation", "named padding"],
)
def test_layers_that_no_product_stands_for_stay(layer: nn.Conv2d) -> None:
    multiply_convolutions(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, MatmulConv2d), (torch.bfloat16, nn.Conv2d)])
def test_a_base_loaded_for_a_cpu_chooses_in_float32(
    tiny_sd1: Path, dtype: torch.dtype, expected: type[nn.Module]
) -> None:
    unet = load_model(tiny_sd1, dtype=dtype).unet
    assert {type(module) for module in unet.modules() if isinstance(module, nn.Conv2d)} == {expected}
