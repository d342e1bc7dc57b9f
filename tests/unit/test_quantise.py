"""Linear layers that keep their weight in 4 or 8 bits."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.frozen import Quantised, full_weight
from lora_diffusion.errors import UserError
from lora_diffusion.models.quantise import QuantisedLinear, check_quantise, quantise_linears

KINDS: tuple[Literal["nf4", "int8"], ...] = ("nf4", "int8")
SHAPES = [(320, 320), (96, 48), (48, 96), (33, 62), (20, 12), (11, 7)]
"""(out, in). Only the first is a multiple of NF4's block; 48 and 96 are the widths of the base that ships."""

# The 16 levels of 4-bit NormalFloat: QLoRA, appendix E.
# fmt: off
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def gaussian_linear(out: int, inputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(out + inputs)
    layer = nn.Linear(inputs, out, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype).requires_grad_(False)


def inputs_for(layer: nn.Linear, *, requires_grad: bool = False) -> Tensor:
    x = torch.randn((2, 5, layer.in_features), generator=torch.Generator().manual_seed(1))
    return x.to(layer.weight.dtype).requires_grad_(requires_grad)


def relative_error(weight: Tensor, exact: Tensor) -> float:
    return float((weight.double() - exact.double()).norm() / exact.double().norm())


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_that_of_a_plain_layer_with_the_dequantised_weight(
    kind: Literal["nf4", "int8"], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    layer = gaussian_linear(*shape, dtype=dtype)
    quantised = QuantisedLinear(layer, kind, "cpu")
    x = inputs_for(layer)
    output = quantised(x)
    assert quantised.dequantised_weight().dtype == output.dtype == dtype
    assert quantised.dequantised_weight().shape == shape
    # the same product of the same numbers: nothing is rounded differently
    assert torch.equal(output, nn.functional.linear(x, quantised.dequantised_weight(), layer.bias))


@kinds
@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_of_the_input_is_the_outputs_times_the_dequantised_weight(
    kind: Literal["nf4", "int8"], dtype: torch.dtype, bias: bool
) -> None:
    layer = gaussian_linear(96, 48, bias=bias, dtype=dtype)
    quantised = QuantisedLinear(layer, kind, "cpu")
    x = inputs_for(layer, requires_grad=True)
    output = quantised(x)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    output.backward(grad_output)
    assert torch.equal(x.grad, grad_output @ quantised.dequantised_weight())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in quantised.parameters())


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(kind: Literal["nf4", "int8"], use_reentrant: bool) -> None:
    quantised = QuantisedLinear(gaussian_linear(96, 48), kind, "cpu")
    plain, recomputed = (inputs_for(quantised, requires_grad=True) for _ in range(2))
    quantised(plain).square().sum().backward()
    checkpoint(quantised, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(plain.grad, recomputed.grad)


@kinds
def test_no_dequantised_weight_is_kept_for_the_backward_pass(
    kind: Literal["nf4", "int8"], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack, unpacked = QuantisedLinear.dequantised_weight, []

    def watched(layer: QuantisedLinear) -> Tensor:
        weight = unpack(layer)
        unpacked.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(QuantisedLinear, "dequantised_weight", watched)
    quantised = QuantisedLinear(gaussian_linear(96, 48), kind, "cpu")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = quantised(inputs_for(quantised, requires_grad=True))
    assert [reference() for reference in unpacked] == [None]
    assert saved == []
    output.sum().backward()
    assert [reference() for reference in unpacked] == [None, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_rounds_to_the_nearest_published_level_of_each_block_of_64(shape: tuple[int, int]) -> None:
    layer = gaussian_linear(*shape)
    flat = layer.weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - NF4_LEVELS).abs().argmin(-1)
    expected = (NF4_LEVELS[nearest] * largest).flatten()[: len(flat)].view(shape)
    found = QuantisedLinear(layer, "nf4", "cpu").dequantised_weight()
    # The scales are quantised too, to 8 bits around their mean: off by half a gap of at most 1.4 % of the largest
    # distance from the mean, and no scale here is less than half that distance.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_off_by_nine_percent_on_gaussian_weights(dtype: torch.dtype) -> None:
    layer = gaussian_linear(1280, 1280, dtype=dtype)
    error = relative_error(QuantisedLinear(layer, "nf4", "cpu").dequantised_weight(), layer.weight)
    # The levels' gaps, 0.08 to 0.30 of the block's largest value, which is 2.4 standard deviations for 64 of them:
    # gap / √12, weighted by how often a gaussian falls into each gap, is 0.09. The sample is 1.6 million values.
    assert error == pytest.approx(expected_nf4_error(), rel=0.01)
    assert 0.085 < error < 0.097


def expected_nf4_error() -> float:
    """Root mean square error of NF4 on a unit gaussian, drawn once more and rounded in float64 by the definition."""
    blocks = torch.randn((20_000, 64), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = NF4_LEVELS.double()
    nearest = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
    return float((levels[nearest] * largest - blocks).square().mean().sqrt())


@pytest.mark.parametrize("inputs", [320, 1280, 5120])
def test_int8_is_off_by_a_twelfth_root_of_its_step(inputs: int) -> None:
    layer = gaussian_linear(640, inputs)
    error = relative_error(QuantisedLinear(layer, "int8", "cpu").dequantised_weight(), layer.weight)
    steps = layer.weight.double().abs().amax(1) / 127
    # Rounding to whole steps is off by step / √12 in the root mean square (uniform error); largest / standard deviation
    # of a gaussian row is 3.0 to 3.8 for these lengths, hence 0.7 to 0.9 %.
    expected = float((steps.square().mean() / 12).sqrt() / layer.weight.double().square().mean().sqrt())
    assert error == pytest.approx(expected, rel=0.01)
    assert 0.006 < error < 0.0095


@kinds
def test_rows_of_zeros_stay_zero(kind: Literal["nf4", "int8"]) -> None:
    layer = gaussian_linear(64, 128)
    layer.weight[3:7] = 0
    weight = QuantisedLinear(layer, kind, "cpu").dequantised_weight()
    assert torch.isfinite(weight).all()
    assert not weight[3:7].any()


@pytest.mark.parametrize(("kind", "largest_share"), [("nf4", 0.30), ("int8", 0.55)])
def test_layers_of_stable_diffusion_take_a_fraction_of_their_16_bit_size(
    kind: Literal["nf4", "int8"], largest_share: float
) -> None:
    # attention, text keys, feed-forward in and out, time embedding: the smallest and largest linear layers of SD 1.5
    shapes = [(320, 320), (320, 768), (10240, 1280), (1280, 5120), (1280, 1280)]
    root = nn.Sequential(*(gaussian_linear(*shape, dtype=torch.bfloat16) for shape in shapes))
    before = sum(parameter.nbytes for parameter in root.parameters())
    quantise_linears(root, kind, "cpu")
    stored = {*root.parameters(), *root.buffers()}
    for module in root.modules():  # nothing is hidden from parameters() and buffers()
        assert not [v for v in vars(module).values() if isinstance(v, Tensor)]
    after = sum(tensor.nbytes for tensor in stored)
    assert all(isinstance(layer, QuantisedLinear) for layer in root)
    assert after / before <= largest_share
    shares = [
        sum(p.nbytes for p in layer.parameters()) / (2 * out * inputs)
        for layer, (out, inputs) in zip(root, shapes, strict=True)
    ]
    assert max(shares) <= largest_share


def test_only_linear_layers_are_quantised_and_keep_their_biases() -> None:
    root = nn.ModuleDict({"proj": gaussian_linear(96, 48), "conv": nn.Conv2d(4, 4, 1), "norm": nn.LayerNorm(48)})
    conv, norm, bias = root["conv"], root["norm"], root["proj"].bias.clone()
    quantise_linears(root, "nf4", "cpu")
    assert isinstance(root["proj"], nn.Linear) and isinstance(root["proj"], Quantised)
    assert torch.equal(root["proj"].bias, bias)
    assert root["conv"] is conv and root["norm"] is norm


def test_no_copy_of_the_full_weights_is_left() -> None:
    root = nn.Sequential(*(gaussian_linear(101, 103) for _ in range(3)))
    quantise_linears(root, "int8", "cpu")
    gc.collect()
    full = [
        t
        for t in gc.get_objects()
        if type(t) in (Tensor, nn.Parameter) and t.shape == (101, 103) and t.dtype == torch.float32
    ]
    assert full == []


@kinds
def test_state_round_trips(kind: Literal["nf4", "int8"]) -> None:
    first = QuantisedLinear(gaussian_linear(96, 48), kind, "cpu")
    other = gaussian_linear(96, 48)
    other.weight.mul_(-1.7)
    second = QuantisedLinear(other, kind, "cpu")
    assert not torch.equal(second.dequantised_weight(), first.dequantised_weight())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.dequantised_weight(), first.dequantised_weight())


@kinds
def test_stand_in_for_the_weight_tells_shape_dtype_and_device_and_poisons_arithmetic(
    kind: Literal["nf4", "int8"],
) -> None:
    quantised = QuantisedLinear(gaussian_linear(96, 48, dtype=torch.bfloat16), kind, "cpu")
    weight = quantised.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((96, 48), torch.bfloat16, "cpu")
    assert weight.untyped_storage().nbytes() == 2
    assert weight.sum().isnan()
    assert torch.equal(full_weight(quantised), quantised.dequantised_weight().float())


@kinds
def test_casting_a_quantised_layer_is_refused_rather_than_done_wrongly(kind: Literal["nf4", "int8"]) -> None:
    quantised = QuantisedLinear(gaussian_linear(96, 48), kind, "cpu").half()
    with pytest.raises(AssertionError, match="cast to another dtype"):
        quantised.dequantised_weight()


def test_missing_bitsandbytes_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="pip install 'bitsandbytes"):
        check_quantise("nf4")
    check_quantise("int8")
    check_quantise("none")


@pytest.mark.gpu
@kinds
def test_gpu_agrees_with_the_cpu_and_can_be_captured_in_a_graph(kind: Literal["nf4", "int8"]) -> None:
    layer = gaussian_linear(320, 640, dtype=torch.bfloat16)
    on_cpu, on_gpu = QuantisedLinear(layer, kind, "cpu"), QuantisedLinear(layer, kind, "cuda")
    # a value half-way between two levels may fall to either side
    assert relative_error(on_gpu.dequantised_weight().cpu(), on_cpu.dequantised_weight()) < 0.01
    x = inputs_for(layer).cuda()
    expected = on_gpu(x)
    torch.testing.assert_close(on_cpu.to("cuda")(x), expected, rtol=0.02, atol=0.02)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = on_gpu(x)
    graph.replay()
    assert torch.equal(output, expected)
