"""What holds for every adapter kind on a base that is kept in 4 or 8 bits."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer, with_weight
from lora_diffusion.adapters.frozen import full_weight
from lora_diffusion.adapters.inject import eject, inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.models.quantise import QuantisedLinear, quantise_linears
from lora_diffusion.streams import stream

PATHS = ("attn.to_q", "attn.to_out.0")

both = [pytest.mark.parametrize("kind", ADAPTERS), pytest.mark.parametrize("quantise", ["nf4", "int8"])]


def kinds_and_formats(test):
    for mark in both:
        test = mark(test)
    return test


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(48, 96), "to_out": nn.ModuleList([nn.Linear(96, 48, bias=False)])})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn["to_out"][0](self.attn["to_q"](x))


def quantised_model(quantise: Literal["nf4", "int8"], dtype: torch.dtype = torch.float32) -> Model:
    model = Model().to(dtype)
    quantise_linears(model, quantise, "cpu")
    return model


def make_adapter(kind: str, layer: Layer, *, trained: bool = True) -> Adapter:
    adapter = ADAPTERS[kind](layer, rank=4, alpha=6.0, generator=stream(0, "init"))
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


def inject_all(model: nn.Module, kind: str, *, trained: bool = True) -> dict[str, Adapter]:
    layers = select_layers(model, ["."])
    assert tuple(layers) == PATHS
    return inject(model, layers, lambda _, layer: make_adapter(kind, layer, trained=trained))


def model_input() -> Tensor:
    return torch.randn((2, 7, 48), generator=stream(1, "input"))


@kinds_and_formats
def test_a_new_adapter_changes_nothing(kind: str, quantise: Literal["nf4", "int8"]) -> None:
    model, x = quantised_model(quantise), model_input()
    expected = model(x)
    inject_all(model, kind, trained=False)
    # a kind that adds delta to the weight multiplies with the same numbers
    assert torch.equal(model(x), expected)


@kinds_and_formats
def test_output_is_that_of_the_dequantised_weight_plus_delta(kind: str, quantise: Literal["nf4", "int8"]) -> None:
    base = quantised_model(quantise).attn["to_q"]
    adapter = make_adapter(kind, base)
    adapter.strength = -1.5
    expected = with_weight(base, model_input(), full_weight(base) - 1.5 * adapter.delta())
    assert adapter.delta().shape == (96, 48)
    # float32 sums of about 50 terms below 1, in another order
    for output in (adapter(model_input()), Adapter.forward(adapter, model_input())):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    change = Adapter.change(adapter, model_input(), -1.5)
    torch.testing.assert_close(base(model_input()) + change, expected, rtol=1e-5, atol=1e-5)


@kinds_and_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_dequantises_each_layer_once_and_leaves_plain_layers(
    kind: str, quantise: Literal["nf4", "int8"], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised_model(quantise, dtype)
    adapters = inject_all(model, kind)
    adapters["attn.to_q"].strength = 0.7
    with torch.no_grad():
        expected = {path: full_weight(a.base) + a.strength * a.delta() for path, a in adapters.items()}
    bases = {path: adapter.base for path, adapter in adapters.items()}
    unpack, unpacked = QuantisedLinear.dequantised_weight, []

    def counted(layer: QuantisedLinear) -> Tensor:
        unpacked.append(layer)
        return unpack(layer)

    monkeypatch.setattr(QuantisedLinear, "dequantised_weight", counted)
    merge(model, adapters)
    assert unpacked == list(bases.values())
    for path in PATHS:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        assert not layer.weight.requires_grad
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, expected[path].to(dtype)), "added in float32 and rounded once"
        assert (layer.bias is None) == (bases[path].bias is None)
        assert layer.bias is None or torch.equal(layer.bias, bases[path].bias)


@kinds_and_formats
def test_merged_model_gives_the_same_output_as_the_adapters(kind: str, quantise: Literal["nf4", "int8"]) -> None:
    model, x = quantised_model(quantise), model_input()
    untouched = model(x)
    adapters = inject_all(model, kind)
    expected = model(x)
    merge(model, adapters)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - untouched).abs().max() > 0.05


@kinds_and_formats
def test_eject_puts_the_very_same_quantised_layers_back(kind: str, quantise: Literal["nf4", "int8"]) -> None:
    model, x = quantised_model(quantise), model_input()
    layers, output = select_layers(model, ["."]), model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = inject_all(model, kind)
    model(x).square().sum().backward()
    eject(model, adapters)
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), output)


@kinds_and_formats
def test_gradients_are_those_on_a_plain_base_with_the_dequantised_weight(
    kind: str, quantise: Literal["nf4", "int8"]
) -> None:
    quantised, x = quantised_model(quantise), model_input()
    plain = Model()
    for path in PATHS:
        plain.get_submodule(path).weight.data = full_weight(quantised.get_submodule(path))
    gradients = []
    for model in (quantised, plain):
        adapters = inject_all(model, kind)
        model(x).square().mean().backward()
        trained = [p for adapter in adapters.values() for p in adapter.parameters() if p.requires_grad]
        gradients.append([parameter.grad for parameter in trained])
    assert gradients[0]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)  # the same products of the same numbers
        assert ours.any()


@kinds_and_formats
def test_one_adapter_in_a_stack_gives_what_it_gives_alone(kind: str, quantise: Literal["nf4", "int8"]) -> None:
    base = quantised_model(quantise).attn["to_q"]
    adapter = make_adapter(kind, base)
    stack = AdapterStack(base)
    stack.add("a", adapter)
    stack.weights.set(["a"], torch.full((2, 1), 0.7))
    adapter.strength = 0.7
    torch.testing.assert_close(stack(model_input()), adapter(model_input()), rtol=1e-5, atol=1e-5)
