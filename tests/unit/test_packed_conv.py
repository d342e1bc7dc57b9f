"""Frozen convolutions in oneDNN's order, against plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.base import changed_weight
from lora_diffusion.adapters.frozen import Quantised, full_weight
from lora_diffusion.adapters.inject import eject, inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.models.packed_conv import (
    _WIDTHS,
    PackedConv2d,
    PointwiseConv2d,
    has_fast_bf16,
    pack_convolutions,
)
from lora_diffusion.streams import stream
from tests import sd15

packs = pytest.mark.skipif(not has_fast_bf16(), reason="needs a CPU for which convolutions are packed (AVX-512)")

BF16 = 2**-8  # half the distance of neighbouring numbers, relative


def convolution(inputs: int, outputs: int, *, bias: bool = True, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    generator = torch.Generator().manual_seed(inputs + outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (inputs * kernel**2) ** 0.5)
    return layer.bfloat16().requires_grad_(False)


def picture(batch: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn((batch, channels, height, width), generator=torch.Generator().manual_seed(seed)).bfloat16()


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(1, 64, 64, 8, 8), (2, 128, 64, 5, 12), (1, 64, 320, 3, 3)])
def test_output_and_gradient_are_those_of_the_plain_layer(
    shape: tuple[int, int, int, int, int], kernel: int, stride: int, bias: bool
) -> None:
    batch, inputs, outputs, height, width = shape
    plain = convolution(inputs, outputs, bias=bias, kernel=kernel, stride=stride)
    root = nn.Sequential(copy.deepcopy(plain))
    pack_convolutions(root)
    assert type(root[0]) is (PackedConv2d if kernel == 3 else PointwiseConv2d if stride == 1 else nn.Conv2d)
    x = picture(batch, inputs, height, width).requires_grad_()
    plain.double()
    exact = plain(x.double())
    grad_output = picture(batch, *exact.shape[1:], seed=2)
    (exact_grad,) = torch.autograd.grad(exact, x, grad_output.double())
    output = root(x)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    assert (output.shape, output.dtype, grad.dtype) == (exact.shape, torch.bfloat16, torch.bfloat16)
    # sums in float32, rounded once to bfloat16; the sums have a spread of 1
    rtol, atol = BF16, 1e-4
    if kernel == 1 and bias:  # torch's products round before a bias is added, too
        rtol, atol = 2 * BF16, BF16 * float(plain.bias.abs().max()) + 1e-4
    torch.testing.assert_close(output.double(), exact, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        grad.double(), exact_grad.double(), rtol=2 * BF16, atol=1e-4
    )  # the exact one rounded too


@packs
def test_layers_of_all_sizes_that_are_packed_in_turn_keep_their_gradients() -> None:
    sizes = [(64, 128), (64, 64), (128, 64), (64, 64)]
    layers = [convolution(inputs, outputs) for inputs, outputs in sizes]
    root = nn.Sequential(*copy.deepcopy(layers))
    assert pack_convolutions(root) == len(layers)
    for plain, packed in zip(layers, root, strict=True):
        x = picture(1, plain.in_channels, 6, 6).requires_grad_()
        grad_output = picture(1, plain.out_channels, 6, 6, seed=2)
        (exact,) = torch.autograd.grad(plain.double()(x.double()), x, grad_output.double())
        (grad,) = torch.autograd.grad(packed(x), x, grad_output)
        torch.testing.assert_close(grad.double(), exact.double(), rtol=2 * BF16, atol=1e-4)  # as above


@packs
def test_nothing_is_saved_for_the_backward_pass_and_no_weight_is_kept_unpacked() -> None:
    packed = PackedConv2d(convolution(64, 64))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed(picture(1, 64, 8, 8).requires_grad_())
    assert saved == []
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@packs
def test_the_weight_can_be_had_again_bit_for_bit_and_its_stand_in_poisons_arithmetic() -> None:
    plain = convolution(64, 128)
    packed = PackedConv2d(plain)
    assert isinstance(packed, Quantised) and isinstance(packed, nn.Conv2d)
    assert torch.equal(packed.dequantised_weight(), plain.weight)
    assert torch.equal(full_weight(packed), plain.weight.float())
    assert (packed.weight.shape, packed.weight.dtype) == (plain.weight.shape, torch.bfloat16)
    assert packed.weight.untyped_storage().nbytes() == 2
    assert packed.weight.sum().isnan()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_packed_layer_is_described_as_what_it_packs() -> None:
    """Messages name the layer that an adapter does not fit."""
    plain = nn.Conv2d(64, 128, 3, padding=1, bias=False)  # float32 can be packed on every CPU with oneDNN
    assert repr(PackedConv2d(plain)) == repr(plain).replace("Conv2d", "PackedConv2d")


@packs
def test_without_gradients_there_is_one_weight_and_a_backward_pass_is_refused() -> None:
    root = nn.Sequential(convolution(64, 64))
    x = picture(1, 64, 8, 8).requires_grad_()
    expected = PackedConv2d(root[0])(x)
    pack_convolutions(root, needs_gradients=False)
    assert root[0].packed_mirror is None
    output = root(x)
    assert torch.equal(output, expected)
    with pytest.raises(RuntimeError, match="packed without"):
        output.sum().backward()


@packs
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    packed = PackedConv2d(convolution(64, 64))
    kept, recomputed = (picture(1, 64, 4, 4).requires_grad_() for _ in range(2))
    packed(kept).square().sum().backward()
    checkpoint(packed, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(kept.grad, recomputed.grad)


@pytest.mark.parametrize(
    "layer",
    [
        convolution(64, 96),
        convolution(4, 64),
        convolution(64, 64, stride=3),
        convolution(64, 64).requires_grad_(),
        convolution(64, 64).float(),
        nn.Conv2d(64, 64, 3, 1, 1, padding_mode="circular").bfloat16(),
        nn.Conv2d(64, 64, 3, 1, 1, groups=2).bfloat16(),
        nn.Conv2d(64, 64, 3, 1, 0).bfloat16(),
    ],
    ids=["width", "first", "stride", "trained", "float32", "padding mode", "groups", "padding"],
)
def test_layers_that_would_not_gain_or_would_come_out_otherwise_stay(layer: nn.Conv2d) -> None:
    root = nn.Sequential(layer)
    assert pack_convolutions(root) == 0
    assert root[0] is layer and type(layer) is nn.Conv2d


def test_all_large_convolutions_of_stable_diffusion_gain() -> None:
    sizes = {
        path: (module.in_channels, module.out_channels)
        for path, module in sd15.make_unet().named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }
    blocked = [path for path, (inputs, outputs) in sizes.items() if {inputs, outputs} <= {*_WIDTHS}]
    assert len(blocked) == 50
    assert sizes.keys() - blocked == {"conv_in", "conv_out"}


@packs
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_kind_does_on_a_packed_layer_what_it_does_on_a_plain_one(
    kind: str, kernel: int, stride: int
) -> None:
    plain_root = nn.Sequential(convolution(64, 64, kernel=kernel, stride=stride))
    packed_root = copy.deepcopy(plain_root)
    assert pack_convolutions(packed_root) == (kernel == 3)
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    x = picture(2, 64, 6, 6)
    for root in (plain_root, packed_root):
        layers = select_layers(root, ("0",))
        adapters = inject(root, layers, lambda path, layer: ADAPTERS[kind](layer, 4, 4.0, generator=stream(0, path)))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapters["0"].trained():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        outputs.append(root(x))
        outputs[-1].float().square().mean().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in adapters["0"].trained()]))
        merge(root, adapters)
    # both round to bfloat16, after sums in another order; a product with a bias does so once more
    rounding = 2 * BF16 if kernel == 3 else 4 * BF16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=rounding, atol=rounding)
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.9999
    assert type(packed_root[0]) is (nn.Conv2d if kernel == 3 else PointwiseConv2d)
    torch.testing.assert_close(packed_root[0].weight, plain_root[0].weight, rtol=BF16, atol=0)
    torch.testing.assert_close(packed_root(x), plain_root(x), rtol=rounding, atol=rounding)


@packs
def test_ejecting_an_adapter_leaves_the_packed_layer_and_merging_rounds_once() -> None:
    root = nn.Sequential(convolution(64, 64))
    exact = root[0].weight.clone()
    pack_convolutions(root)
    packed = root[0]
    adapters = inject(root, select_layers(root, ("0",)), lambda path, layer: ADAPTERS["lora"](layer, 4, 4.0))
    eject(root, adapters)
    assert root[0] is packed
    with torch.no_grad():
        adapters["0"].lora_up.weight.fill_(0.01)
    expected = (exact.float() + adapters["0"].delta()).bfloat16()
    assert torch.equal(changed_weight(adapters["0"]), expected)
