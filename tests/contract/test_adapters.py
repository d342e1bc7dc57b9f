"""What holds for every adapter kind. A new line in `ADAPTERS` is tested here without a new test."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer, with_weight
from lora_diffusion.adapters.inject import eject, inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.streams import stream

LAYERS = ("linear", "linear-no-bias", "conv1x1", "conv3x3", "conv3x3-stride2")

kinds = pytest.mark.parametrize("kind", ADAPTERS)
layers = pytest.mark.parametrize("layer", LAYERS)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def make_layer(name: str) -> Layer:
    layer: Layer
    if name.startswith("linear"):
        layer = nn.Linear(12, 20, bias=name == "linear")
    elif name == "conv1x1":
        layer = nn.Conv2d(12, 20, 1)
    else:
        layer = nn.Conv2d(12, 20, 3, stride=2 if name.endswith("stride2") else 1, padding=1)
    seeded(layer)
    return layer


def make_input(layer: Layer, batch: int = 3) -> Tensor:
    shape = (batch, 7, 12) if isinstance(layer, nn.Linear) else (batch, 12, 8, 8)
    return torch.randn(shape, generator=stream(1, "input"), dtype=torch.float32).to(layer.weight.dtype)


def make_adapter(kind: str, layer: Layer, *, trained: bool = True, seed: int = 3) -> Adapter:
    adapter = ADAPTERS[kind](layer, rank=4, alpha=6.0, generator=stream(0, "init"))
    if trained:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": make_layer("linear"), "to_out": nn.ModuleList([nn.Linear(20, 12)])})
        self.conv = make_layer("conv3x3")
        self.norm = nn.LayerNorm(12)
        seeded(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.attn["to_out"][0](self.attn["to_q"](x)))  # (B, 64, 12)
        return self.conv(x.transpose(1, 2).unflatten(2, (8, 8)))


def state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def model_input() -> Tensor:
    return torch.randn((2, 64, 12), generator=stream(2, "input"))


def test_there_is_a_kind_to_test() -> None:
    assert ADAPTERS
    assert all(ADAPTERS[name].kind == name for name in ADAPTERS)


@kinds
@layers
def test_a_new_adapter_changes_nothing(kind: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    expected = base(x)
    adapter = make_adapter(kind, base, trained=False)
    assert torch.equal(adapter(x), expected)
    assert not adapter.delta().any()


@kinds
@layers
def test_merged_layer_gives_the_same_output_as_the_adapter(kind: str, layer: str) -> None:
    root = nn.Sequential(make_layer(layer))
    x = make_input(root[0])
    untouched = root(x)
    adapters = inject(root, select_layers(root, ["0"]), lambda _, base: make_adapter(kind, base))
    adapters["0"].strength = 0.7
    expected = root(x)
    merge(root, adapters)
    assert isinstance(root[0], nn.Linear | nn.Conv2d)
    # float32 sums of about 100 terms of size 1, in another order
    torch.testing.assert_close(root(x), expected, rtol=1e-5, atol=1e-5)
    assert (root(x) - untouched).abs().max() > 0.1


@kinds
@layers
def test_output_is_base_plus_strength_times_delta(kind: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    adapter = make_adapter(kind, base)
    adapter.strength = -1.5
    expected = with_weight(base, x, base.weight - 1.5 * adapter.delta())
    torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)


@kinds
@layers
def test_strength_zero_is_the_base_bit_for_bit(kind: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    expected = base(x)
    adapter = make_adapter(kind, base)
    adapter.strength = 0.0
    assert torch.equal(adapter(x), expected)


@kinds
def test_eject_restores_the_model_bit_for_bit(kind: str) -> None:
    model, x = Model(), model_input()
    before, output, printed = state_hash(model), model(x), str(model)
    adapters = inject(
        model, select_layers(model, [r"to_q$", r"to_out\.0$", r"^conv$"]), lambda _, b: make_adapter(kind, b)
    )
    assert len(adapters) == 3
    assert not torch.equal(model(x), output)
    eject(model, adapters)
    assert state_hash(model) == before
    assert str(model) == printed
    assert torch.equal(model(x), output)


@kinds
@layers
def test_tensors_round_trip(kind: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    adapter = make_adapter(kind, base)
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    assert not any(tensor.requires_grad for tensor in tensors.values())
    again = type(adapter).from_tensors(base, tensors)
    assert torch.equal(again(x), adapter(x))
    assert again.tensors().keys() == tensors.keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in tensors.items())


@kinds
def test_tensors_share_memory_with_what_is_trained(kind: str) -> None:
    adapter = make_adapter(kind, make_layer("linear"))
    trained = {parameter.data_ptr() for parameter in adapter.parameters() if parameter.requires_grad}
    assert trained <= {tensor.data_ptr() for tensor in adapter.tensors().values()}


@kinds
@layers
def test_gradients_reach_the_adapter_and_nothing_else(kind: str, layer: str) -> None:
    base = make_layer(layer)
    adapter = make_adapter(kind, base)
    adapter(make_input(base)).square().mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    own = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    assert own
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own)


@kinds
@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_stays_float32_on_a_half_precision_base(kind: str, layer: str, dtype: torch.dtype) -> None:
    base = make_layer(layer).to(dtype)
    x = make_input(base)
    adapter = make_adapter(kind, base)
    output = adapter(x)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    own = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32 for parameter in own)
    exact = with_weight(base.float(), x.float(), base.weight + adapter.delta())
    # the factors, both products and their sum are each rounded to the dtype: a few ulp of the largest value
    atol = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=atol)


@kinds
@layers
def test_delta_is_float32_in_the_shape_of_the_weight(kind: str, layer: str) -> None:
    base = make_layer(layer).to(torch.bfloat16)
    delta = make_adapter(kind, base).delta()
    assert delta.dtype == torch.float32
    assert delta.shape == base.weight.shape


@kinds
@layers
def test_one_adapter_in_a_stack_gives_what_it_gives_alone(kind: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    adapter = make_adapter(kind, base)
    stack = AdapterStack(base)
    stack.add("a", adapter)
    stack.weights.set(["a"], torch.full((3, 1), 0.7))
    adapter.strength = 0.7
    torch.testing.assert_close(stack(x), adapter(x), rtol=1e-5, atol=1e-5)


@kinds
def test_making_and_running_an_adapter_draws_nothing_from_the_global_generator(kind: str) -> None:
    base = make_layer("conv3x3")
    before = torch.get_rng_state()
    adapter = make_adapter(kind, base)
    adapter(make_input(base))
    type(adapter).from_tensors(base, adapter.tensors())
    assert torch.equal(torch.get_rng_state(), before)


@kinds
def test_the_start_is_a_function_of_the_generator(kind: str) -> None:
    def start(seed: int) -> list[Tensor]:
        adapter = ADAPTERS[kind](make_layer("linear"), rank=4, alpha=4.0, generator=stream(seed, "init"))
        return list(adapter.tensors().values())

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))
