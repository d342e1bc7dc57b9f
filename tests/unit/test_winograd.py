"""Winograd's convolutions, against torch's own in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.base import changed_weight
from lora_diffusion.adapters.frozen import Quantised, full_weight
from lora_diffusion.adapters.inject import eject, inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.generation.request_line import load_engine
from lora_diffusion.models import winograd
from lora_diffusion.models.matmul_conv import MatmulConv2d, multiply_convolutions
from lora_diffusion.models.winograd import MIN_CHANNELS, WinogradConv2d, transform_convolutions
from lora_diffusion.streams import stream
from tests import sd15

FLOAT32 = 2**-24


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    generator = torch.Generator().manual_seed(inputs + outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (inputs * kernel**2) ** 0.5)
    return layer.requires_grad_(False)


def transformed(layer: nn.Conv2d) -> WinogradConv2d:
    copied = copy.deepcopy(layer)
    WinogradConv2d.transform(copied)
    assert isinstance(copied, WinogradConv2d)
    return copied


def picture(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strip_bytes", [16 << 20, 1, 16_000], ids=["whole", "row by row", "in parts"])
@pytest.mark.parametrize(
    "shape",
    [(1, 24, 40, 8, 8), (3, 24, 40, 10, 4), (2, 40, 24, 7, 9), (1, 24, 24, 1, 1), (2, 24, 24, 5, 2)],
    ids=["square", "batch", "odd sides", "one pixel", "one odd side"],
)
def test_output_and_gradient_are_those_of_the_plain_layer(
    shape: tuple[int, int, int, int, int],
    strip_bytes: int,
    bias: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "_STRIP_BYTES", strip_bytes)
    batch, inputs, outputs, height, width = shape
    plain = convolution(inputs, outputs, bias=bias)
    layer = transformed(plain)
    x = picture(batch, inputs, height, width).requires_grad_()
    grad_output = picture(batch, outputs, height, width, seed=2)
    exact_bias = None if plain.bias is None else plain.bias.double()
    exact = nn.functional.conv2d(x.double(), plain.weight.double(), exact_bias, 1, 1)
    (exact_grad,) = torch.autograd.grad(exact, x, grad_output.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = layer(x)
        (grad,) = torch.autograd.grad(output, x, grad_output)
    finally:
        torch.set_num_threads(before)
    assert output.is_contiguous() and grad.is_contiguous()
    # sums of up to 360 numbers with a spread of 1 in all, in float32
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=100 * FLOAT32)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=0, atol=100 * FLOAT32)


def test_a_picture_that_lies_channels_last_comes_out_alike() -> None:
    layer = transformed(convolution(24, 40))
    x = picture(2, 24, 6, 6)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_a_number_that_is_none_does_not_go_unnoticed() -> None:
    layer = transformed(convolution(24, 40))
    x = picture(1, 24, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    assert layer(x)[0, :, 1:4, 1:4].isnan().all()


def test_nothing_is_saved_for_the_backward_pass_and_the_weight_is_kept_in_one_form() -> None:
    plain = convolution(24, 40)
    layer = transformed(plain)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(picture(1, 24, 8, 8).requires_grad_())
    assert saved == []
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    assert sizes == {"bias": 40, "transformed": plain.weight.numel() * 16 // 9}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_weight_can_be_had_again_and_its_stand_in_poisons_arithmetic() -> None:
    plain = convolution(24, 40)
    layer = transformed(plain)
    assert isinstance(layer, Quantised) and isinstance(layer, nn.Conv2d)
    # two sums of up to nine weights, of which the largest has the size of 3 spreads: 3 / sqrt(24 * 9) * 9 / 4
    torch.testing.assert_close(layer.dequantised_weight(), plain.weight, rtol=0, atol=2 * FLOAT32)
    assert torch.equal(full_weight(layer), layer.dequantised_weight())
    assert (layer.weight.shape, layer.weight.dtype) == (plain.weight.shape, torch.float32)
    assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.weight.sum().isnan()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    layer = transformed(convolution(24, 24))
    kept, recomputed = (picture(1, 24, 4, 4).requires_grad_() for _ in range(2))
    layer(kept).square().sum().backward()
    checkpoint(layer, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(kept.grad, recomputed.grad)


def test_layers_stay_the_same_objects_and_doing_it_again_changes_nothing() -> None:
    root = nn.Sequential(convolution(MIN_CHANNELS, MIN_CHANNELS))
    layer = root[0]
    multiply_convolutions(root)
    assert transform_convolutions(root, 16 * 16) == 1
    kept = layer.transformed
    multiply_convolutions(root)
    assert transform_convolutions(root, 16 * 16) == 0
    assert root[0] is layer and type(layer) is WinogradConv2d and layer.transformed is kept


@pytest.mark.parametrize(
    ("layer", "num_pixels"),
    [
        (convolution(MIN_CHANNELS, MIN_CHANNELS), 15 * 16),
        (convolution(4, MIN_CHANNELS), 32 * 32),
        (convolution(MIN_CHANNELS, 4), 32 * 32),
        (convolution(MIN_CHANNELS, MIN_CHANNELS, kernel=1), 32 * 32),
        (convolution(MIN_CHANNELS, MIN_CHANNELS, stride=2), 32 * 32),
        (convolution(MIN_CHANNELS, MIN_CHANNELS).bfloat16(), 32 * 32),
        (nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1, padding_mode="circular"), 32 * 32),
        (nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1, groups=2), 32 * 32),
        (nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=0), 32 * 32),
        (nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1, device="meta"), 32 * 32),
    ],
    ids=["small", "first", "last", "1x1", "stride", "bfloat16", "padding mode", "groups", "padding", "no weight yet"],
)
def test_layers_that_would_not_gain_or_would_come_out_otherwise_stay(layer: nn.Conv2d, num_pixels: int) -> None:
    root = nn.Sequential(layer)
    multiply_convolutions(root)
    assert transform_convolutions(root, num_pixels) == 0
    assert type(root[0]) in (nn.Conv2d, MatmulConv2d)


@pytest.mark.parametrize(("side", "expected"), [(8, 0), (16, 11), (32, 22), (64, 33), (128, 47)])
def test_the_layers_of_stable_diffusion_are_chosen_by_the_size_that_each_sees(
    side: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = sd15.make_unet()
    seen: dict[str, int] = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs, path=path: seen.update({path: inputs[0].shape[2] * inputs[0].shape[3]})
            )
    with torch.no_grad():
        unet(picture(1, 4, side, side).to("meta"), torch.zeros(1, device="meta"), picture(1, 77, 768).to("meta"))
    chosen: list[nn.Module] = []
    monkeypatch.setattr(winograd, "_can_be_transformed", _is_wide)
    monkeypatch.setattr(WinogradConv2d, "transform", staticmethod(chosen.append))
    transform_convolutions(unet, side * side)
    wide = {path for path, module in unet.named_modules() if _is_wide(module)}
    expected_paths = {path for path in wide if seen[path] >= winograd.MIN_PIXELS}
    assert {id(layer) for layer in chosen} == {id(unet.get_submodule(path)) for path in expected_paths}
    assert len(chosen) == expected


def _is_wide(module: nn.Module) -> bool:
    keeps_size = isinstance(module, nn.Conv2d) and (module.kernel_size, module.stride) == ((3, 3), (1, 1))
    return keeps_size and min(module.weight.shape[:2]) >= MIN_CHANNELS


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_kind_does_on_a_transformed_layer_what_it_does_on_a_plain_one(kind: str) -> None:
    plain_root = nn.Sequential(convolution(24, 24))
    root = copy.deepcopy(plain_root)
    WinogradConv2d.transform(root[0])
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    x = picture(2, 24, 6, 6)
    for each in (plain_root, root):
        layers = select_layers(each, ("0",))
        adapters = inject(each, layers, lambda path, layer: ADAPTERS[kind](layer, 4, 4.0, generator=stream(0, path)))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapters["0"].trained():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in adapters["0"].trained()]))
        merge(each, adapters)
    # sums of numbers with a spread of 1 in all, in another order
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=100 * FLOAT32)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=100 * FLOAT32)
    assert type(root[0]) is nn.Conv2d
    # the transformation and back rounds by 2, the sum once more
    torch.testing.assert_close(root[0].weight, plain_root[0].weight, rtol=0, atol=4 * FLOAT32)
    torch.testing.assert_close(root(x), plain_root(x), rtol=0, atol=100 * FLOAT32)


def test_ejecting_an_adapter_leaves_the_transformed_layer() -> None:
    root = nn.Sequential(convolution(24, 24))
    exact = root[0].weight.clone()
    WinogradConv2d.transform(root[0])
    layer = root[0]
    adapters = inject(root, select_layers(root, ("0",)), lambda path, layer: ADAPTERS["lora"](layer, 4, 4.0))
    eject(root, adapters)
    assert root[0] is layer
    with torch.no_grad():
        adapters["0"].lora_up.weight.fill_(0.01)
    expected = exact + adapters["0"].delta()
    # the transformation and back rounds by 2, the sum once more
    torch.testing.assert_close(changed_weight(adapters["0"]), expected, rtol=0, atol=4 * FLOAT32)


def test_the_base_of_an_engine_is_transformed(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)
    monkeypatch.setattr(winograd, "MIN_PIXELS", 1)
    unet = load_engine(str(tiny_sd1), torch.float32, torch.device("cpu")).model.unet
    assert any(isinstance(module, WinogradConv2d) for module in unet.modules())
