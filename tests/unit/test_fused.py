"""The frozen linear layer with its LoRA as one step of autograd, against the plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.base import Adapter, Dropout
from lora_diffusion.adapters.fused import can_fuse, joint_lora_linear, lora_linear
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.stacked import stacked_lora_linear
from lora_diffusion.adapters.together import Together
from lora_diffusion.models.quantise import QuantisedLinear

BF16 = 2**-8  # half the distance of neighbouring numbers, relative


def layer(inputs: int = 24, outputs: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(inputs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype).requires_grad_(False)


def trained_lora(base: nn.Linear, init: str = "default") -> LoRA:
    adapter = LoRA(base, 4, 6.0, generator=torch.Generator().manual_seed(1), init=init)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in adapter.trained():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapter


def run(adapter: LoRA, x: Tensor, *, fused: bool) -> list[Tensor]:
    """Output, gradient of the input, gradients of the factors."""
    x = x.clone().requires_grad_()
    output = adapter(x) if fused else Adapter.forward(adapter, x)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [x, *adapter.trained()], grad_output)]


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_forward_and_gradients_are_those_of_the_plain_twin(
    dtype: torch.dtype, tolerance: float, bias: bool, strength: float, init: str
) -> None:
    """Tolerances: some roundings of the dtype, of the norm; the factors are float32 in all of them."""
    adapter = trained_lora(layer(bias=bias, dtype=dtype), init)
    adapter.strength = strength
    x = torch.randn((2, 5, 24), generator=torch.Generator().manual_seed(4)).to(dtype)
    assert can_fuse(x, adapter.base)
    for fused, plain in zip(run(adapter, x, fused=True), run(adapter, x, fused=False), strict=True):
        assert (fused.shape, fused.dtype) == (plain.shape, plain.dtype)
        assert (fused - plain).norm() <= tolerance * plain.norm()


def test_gradients_agree_with_finite_differences() -> None:
    base = layer(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 24), (2, 24), (40, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda x, down, up: lora_linear(x, base, down, up, 0.5), inputs)


def test_only_the_input_the_hidden_values_and_cast_factors_are_kept_for_the_backward_pass() -> None:
    adapter = trained_lora(layer(dtype=torch.bfloat16))
    x = torch.randn((7, 24)).bfloat16()
    permanent = {tensor.data_ptr() for tensor in (adapter.base.weight, *adapter.trained())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x)
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in permanent] == [(7, 24), (7, 4), (4, 24), (40, 4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_on_a_1x1_convolution_with_channels_last_it_is_the_plain_twin_too(
    dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    base = nn.Conv2d(24, 40, 1, bias=bias).to(dtype).requires_grad_(False)
    adapter = trained_lora(base)
    x = torch.randn((2, 24, 3, 5), generator=torch.Generator().manual_seed(4)).to(dtype)
    assert not can_fuse(x, base)
    x = x.contiguous(memory_format=torch.channels_last)
    assert can_fuse(x, base)
    for fused, plain in zip(run(adapter, x, fused=True), run(adapter, x, fused=False), strict=True):
        assert (fused.shape, fused.dtype) == (plain.shape, plain.dtype)
        assert (fused - plain).norm() <= tolerance * plain.norm()  # see the test of linear layers


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(24, 40, 3),
        nn.Conv2d(24, 40, 1, stride=2),
        nn.Conv2d(24, 40, 1, padding=1),
        nn.Conv2d(24, 40, 1, groups=2),
    ],
    ids=["3x3", "stride", "padding", "groups"],
)
def test_other_convolutions_go_the_plain_way(base: nn.Conv2d) -> None:
    assert not can_fuse(torch.randn((1, 24, 4, 4)).contiguous(memory_format=torch.channels_last), base)


def test_a_fresh_adapter_gives_bit_for_bit_the_base() -> None:
    base = layer(dtype=torch.bfloat16)
    x = torch.randn((3, 24)).bfloat16()
    assert torch.equal(LoRA(base, 4, 4.0)(x), base(x))


def test_an_input_that_needs_no_gradient_gets_none_and_costs_none() -> None:
    adapter = trained_lora(layer())
    x = torch.randn((3, 24))
    adapter(x).sum().backward()
    assert x.grad is None
    assert all(parameter.grad is not None for parameter in adapter.trained())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    adapter = trained_lora(layer())
    kept = torch.randn((3, 24), generator=torch.Generator().manual_seed(6)).requires_grad_()
    recomputed = kept.detach().clone().requires_grad_()
    adapter(kept).square().sum().backward()
    first = [parameter.grad.clone() for parameter in adapter.trained()]
    adapter.zero_grad()
    checkpoint(adapter, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(kept.grad, recomputed.grad)
    for parameter, grad in zip(adapter.trained(), first, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_what_the_fused_path_cannot_do_goes_the_plain_way() -> None:
    base = layer()
    x = torch.randn((3, 24))
    assert not can_fuse(x.bfloat16(), base)
    assert not can_fuse(x, QuantisedLinear(base, "int8", "cpu"))
    assert not can_fuse(x, nn.Conv2d(24, 40, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(x, base)
    adapter = trained_lora(base)
    adapter.dropout, adapter.dropout_seed = Dropout(element=0.5), 7
    assert torch.equal(adapter(x), Adapter.forward(adapter, x))
    adapter.strength = 0
    assert torch.equal(adapter(x), base(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["alone", "joint", "stacked", "together"])
def test_a_change_far_below_the_rounding_of_the_output_is_not_lost(way: str, bias: bool) -> None:
    """As at the start of a training. On average over rows, outputs in bfloat16 move by what the LoRA adds."""
    if way == "together" and bias:
        pytest.skip("layers with a bias do not go together")
    bases = [layer(64, 64, bias=bias, dtype=torch.bfloat16) for _ in range(2)]
    loras = [LoRA(base, 8, 8.0, generator=torch.Generator().manual_seed(seed)) for seed, base in enumerate(bases)]
    for lora in loras:
        with torch.no_grad():
            lora.lora_up.weight.normal_(std=3e-4, generator=torch.Generator().manual_seed(2))
        lora.copies = (lora.lora_down.weight.detach().bfloat16(), lora.lora_up.weight.detach().bfloat16())
    x = torch.randn((2, 2000, 64), generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = torch.stack([base(rows) for base, rows in zip(bases, x, strict=True)]).float()
    if way == "alone":
        output = torch.stack([lora(rows) for lora, rows in zip(loras, x, strict=True)])
    elif way == "joint":
        output = joint_lora_linear(x, bases[0], (1, 1), [lora.factors() for lora in loras], (1.0, 1.0))
    elif way == "stacked":
        (output,) = stacked_lora_linear(x, bases[0].weight, bases[0].bias, [[lora] for lora in loras])
    else:
        x = torch.stack([x[0], x[0]])
        expected = torch.stack([base(x[0]) for base in bases]).float()
        group = Together(loras)
        with torch.no_grad():
            group.down.copy_(torch.cat([lora.factors()[0] for lora in loras]))
            group.up.copy_(torch.stack([lora.factors()[1] for lora in loras]))
        output = torch.stack(group(x[0]))
    factors = [[factor.float() for factor in lora.factors()] for lora in loras]
    added = torch.stack([rows.float() @ down.T @ up.T for rows, (down, up) in zip(x, factors, strict=True)])
    assert added.std() < 0.1 * BF16 * expected.std()
    moved = ((output.float() - expected) * added).sum() / added.square().sum()
    # The base's product first, the LoRA would move them by 0.18 of that; a bias of 0.2 takes some of it still.
    assert 0.8 < moved < 1.2
