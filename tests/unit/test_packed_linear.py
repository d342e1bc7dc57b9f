"""Frozen linear layers and 1x1 convolutions in oneDNN's order, against plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.frozen import Quantised, full_weight
from lora_diffusion.adapters.fused import can_fuse
from lora_diffusion.adapters.inject import eject, inject, join, merge, select_layers
from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.models.libraries import Transformer2DModel
from lora_diffusion.models.packed_conv import has_fast_bf16, pack_convolutions
from lora_diffusion.models.packed_linear import (
    _MAX_ROWS,
    PackedLinear,
    PackedPointwise,
    _max_rows,
    _num_rows,
    pack_linears,
)
from lora_diffusion.streams import stream
from tests import sd15

packs = pytest.mark.skipif(not has_fast_bf16(), reason="needs a CPU for which layers are packed (AVX-512)")

BF16 = 2**-8  # half the distance of neighbouring numbers, relative
FEW_PIXELS = 4


def linear(inputs: int = 320, outputs: int = 320, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(inputs + outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    return layer.bfloat16().requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def pointwise(inputs: int = 320, outputs: int = 320, *, bias: bool = True) -> nn.Conv2d:
    """A convolution with the weights of `linear`."""
    layer = linear(inputs, outputs, bias=bias)
    convolution = nn.Conv2d(inputs, outputs, 1, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    convolution.weight.copy_(layer.weight[:, :, None, None])
    if bias:
        convolution.bias.copy_(layer.bias)
    return convolution


def packed_twin(layer: nn.Linear | nn.Conv2d) -> nn.Sequential:
    root = nn.Sequential(copy.deepcopy(layer))
    pack_convolutions(root)
    assert pack_linears(root, FEW_PIXELS) == 1
    assert type(root[0]) is (PackedLinear if isinstance(layer, nn.Linear) else PackedPointwise)
    return root


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 320, 640), (2, 77, 768, 1280), (1, 64, 1280, 320), (3, 300, 100, 52)])
def test_output_and_gradient_are_those_of_the_plain_layer(shape: tuple[int, int, int, int], bias: bool) -> None:
    batch, rows, inputs, outputs = shape
    plain = linear(inputs, outputs, bias=bias)
    packed = PackedLinear(plain)
    x = draw(batch, rows, inputs).requires_grad_()
    exact = copy.deepcopy(plain).double()(x.double())
    grad_output = draw(batch, rows, outputs, seed=2)
    (exact_grad,) = torch.autograd.grad(exact, x, grad_output.double())
    output = packed(x)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    assert (output.shape, output.dtype, grad.dtype) == (exact.shape, torch.bfloat16, torch.bfloat16)
    # sums in float32, rounded once to bfloat16; autograd rounds the exact gradient, too
    torch.testing.assert_close(output.double(), exact, rtol=BF16, atol=1e-4)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=2 * BF16, atol=1e-4)


@packs
@pytest.mark.parametrize("lies_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_the_linear_layer_of_every_pixel(bias: bool, lies_last: bool) -> None:
    plain = pointwise(320, 640, bias=bias)
    packed = packed_twin(plain)[0]
    exact = copy.deepcopy(plain).double()
    x, grad_output = draw(2, 320, 5, 3), draw(2, 640, 5, 3, seed=2)
    if lies_last:
        x, grad_output = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad_output))
    x.requires_grad_()
    expected = exact(x.double())
    (expected_grad,) = torch.autograd.grad(expected, x, grad_output.double())
    output = packed(x)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    torch.testing.assert_close(output.double(), expected, rtol=BF16, atol=1e-4)  # as above
    torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=2 * BF16, atol=1e-4)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed.dequantised_weight(), plain.weight) and packed.weight.shape == plain.weight.shape
    assert packed.weight.sum().isnan()
    assert repr(packed) == repr(plain).replace("Conv2d", "PackedPointwise")


@packs
def test_nothing_is_saved_for_the_backward_pass_and_no_weight_is_kept_unpacked() -> None:
    packed = PackedLinear(linear())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed(draw(4, 320).requires_grad_())
    assert saved == []
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@packs
def test_the_weight_can_be_had_again_bit_for_bit_and_its_stand_in_poisons_arithmetic() -> None:
    plain = linear(320, 640)
    packed = PackedLinear(plain)
    assert isinstance(packed, Quantised) and isinstance(packed, nn.Linear)
    assert torch.equal(packed.dequantised_weight(), plain.weight)
    assert torch.equal(full_weight(packed), plain.weight.float())
    assert (packed.weight.shape, packed.weight.dtype) == (plain.weight.shape, torch.bfloat16)
    assert packed.weight.untyped_storage().nbytes() == 2
    assert packed.weight.sum().isnan()
    assert repr(packed) == repr(plain).replace("Linear", "PackedLinear")  # messages name what an adapter does not fit


@packs
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    packed = PackedLinear(linear())
    kept, recomputed = (draw(4, 320).requires_grad_() for _ in range(2))
    packed(kept).square().sum().backward()
    checkpoint(packed, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(kept.grad, recomputed.grad)


@pytest.mark.parametrize(
    "layer", [linear().requires_grad_(), linear().float(), linear(64, 320), nn.Conv2d(320, 320, 1)],
    ids=["trained", "float32", "many rows", "convolution"],
)  # fmt: skip
def test_layers_that_would_not_gain_stay(layer: nn.Module) -> None:
    root = nn.Sequential(layer)
    assert pack_linears(root, 256) == 0 and root[0] is layer


def test_layers_left_to_others_stay() -> None:
    root = nn.Sequential(linear())
    assert pack_linears(root, FEW_PIXELS, apart_from=set(root)) == 0


@pytest.mark.parametrize(("num_pixels", "narrowest"), [(32 * 32, 640), (64 * 64, 1280), (65 * 65, None)])
def test_of_stable_diffusion_those_that_see_few_rows_gain(num_pixels: int, narrowest: int | None) -> None:
    widths = {
        min(layer.in_features, layer.out_features)
        for block in sd15.make_unet().modules()
        if isinstance(block, Transformer2DModel)
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "attn2.to_k" not in path and "attn2.to_v" not in path  # of 77 tokens
    }
    assert widths == {320, 640, 1280}
    gaining = [width for width in widths if _num_rows(nn.Linear(width, width, device="meta"), num_pixels) <= _MAX_ROWS]
    assert min(gaining, default=None) == narrowest


@pytest.mark.parametrize(
    ("outputs", "num_pixels", "gains"), [(1280, 1024, True), (1280, 1025, False), (960, 1024, False)]
)
def test_layers_with_many_outputs_gain_with_more_rows(outputs: int, num_pixels: int, gains: bool) -> None:
    """As in front of GEGLU at 256 px."""
    layer = nn.Linear(320, outputs, dtype=torch.bfloat16, device="meta")
    assert (_num_rows(layer, num_pixels) <= _max_rows(layer)) is gains


@packs
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("make", [linear, pointwise])
def test_every_adapter_kind_does_on_a_packed_layer_what_it_does_on_a_plain_one(
    make: Callable[[], nn.Linear | nn.Conv2d], kind: str
) -> None:
    plain_root = nn.Sequential(make())
    packed_root = packed_twin(plain_root[0])
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    x = draw(2, 6, 320) if make is linear else draw(2, 320, 2, 3).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for root in (plain_root, packed_root):
        layers = select_layers(root, ("0",))
        adapters = inject(root, layers, lambda path, layer: ADAPTERS[kind](layer, 4, 4.0, generator=stream(0, path)))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapters["0"].trained():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        outputs.append(root(x))
        trained = adapters["0"].trained()
        found = torch.autograd.grad(outputs[-1].float().square().mean(), [x, *trained])
        grads.append(torch.cat([gradient.flatten().float() for gradient in found]))
        merge(root, adapters)
    # both round to bfloat16, after sums in another order; a product with a bias does so once more
    torch.testing.assert_close(outputs[1], outputs[0], rtol=4 * BF16, atol=4 * BF16)
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.9999
    assert type(packed_root[0]) is type(plain_root[0])
    torch.testing.assert_close(packed_root[0].weight, plain_root[0].weight, rtol=BF16, atol=0)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [linear, pointwise])
def test_a_lora_is_one_step_of_autograd_with_it_and_a_fresh_one_gives_bit_for_bit_the_layer(
    make: Callable[..., nn.Linear | nn.Conv2d], bias: bool
) -> None:
    root = packed_twin(make(bias=bias))
    kind = type(root[0])
    x = (draw(4, 320) if make is linear else draw(1, 320, 2, 2)).requires_grad_()
    assert can_fuse(x, root[0])
    expected = root(x)
    adapters = inject(root, select_layers(root, ("0",)), lambda path, layer: LoRA(layer, 8, 8.0))
    output = root(x)
    assert torch.equal(output, expected)
    eject(root, adapters)
    assert type(root[0]) is kind


@packs
@pytest.mark.parametrize("copies", [False, True], ids=["joint", "stacked"])
def test_adapters_of_several_trainings_share_its_product(copies: bool) -> None:
    plain_root = nn.Sequential(linear(320, 640))
    packed_root = packed_twin(plain_root[0])
    x = draw(2, 3, 320)
    results: list[list[Tensor]] = []
    for root in (plain_root, packed_root):
        layout, trainings = JointLayout(), []
        for number in range(2):
            make = stream(number, "lora")
            layers = select_layers(root, ("0",))
            adapters = inject(root, layers, lambda _, layer, make=make: LoRA(layer, 8, 8.0, generator=make))
            lora = adapters["0"]
            assert isinstance(lora, LoRA)
            nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(number))
            eject(root, adapters)
            trainings.append(adapters)
            if copies:
                lora.copies = tuple(p.detach().bfloat16().requires_grad_() for p in lora.trained())
        join(root, trainings, layout)
        rows = x.clone().requires_grad_()
        with layout.divided([(0, 1), (1, 1)]):
            output = root(rows)
            trained = [f for own in trainings for f in (own["0"].copies or own["0"].trained())]
            results.append([output, *torch.autograd.grad(output.float().square().mean(), [rows, *trained])])
    for packed, plain in zip(results[1], results[0], strict=True):
        assert not packed.isnan().any()
        assert (packed.double() - plain.double()).norm() < 2 * BF16 * plain.double().norm()
