"""One frozen layer under the adapters of several trainings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Dropout, Layer
from lora_diffusion.adapters.inject import join, select_layers
from lora_diffusion.adapters.joint import JointAdapters, JointLayout, JointTogether, can_join_together
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.streams import stream

KINDS = tuple(ADAPTERS)


def make_layer(kind: str) -> Layer:
    layer: Layer = nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(6, 8, 3, padding=1, stride=2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=stream(0, "base", parameter.ndim))
    return layer


def make_adapters(base: Layer) -> list[Adapter]:
    """One of each kind, none of them without effect."""
    adapters: list[Adapter] = []
    for number, kind in enumerate(KINDS):
        adapter = ADAPTERS[kind](base, 2, 3.0, generator=stream(number, "init"))
        for parameter in adapter.trained():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=stream(number, "noise", parameter.numel()))
        adapters.append(adapter)
    return adapters


def make_input(base: Layer, batch: int) -> Tensor:
    shape = (batch, 3, 6) if isinstance(base, nn.Linear) else (batch, 6, 4, 4)
    return torch.randn(shape, generator=stream(0, "x"))


def test_plain_loras_on_a_linear_layer_are_fused_to_the_same_numbers() -> None:
    base = make_layer("linear")
    adapters = [ADAPTERS["lora"](base, rank, 3.0, generator=stream(rank, "init")) for rank in (1, 2, 3)]
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight, generator=stream(adapter.rank, "up"))
    joint, layout = joint_of(base, adapters)
    x = make_input(base, 6).requires_grad_()
    shares, out = [(2, 1), (0, 3), (1, 2)], torch.randn(6, 3, 8, generator=stream(0, "out"))
    with layout.divided(shares):
        fused = joint(x)
        gradients = torch.autograd.grad(fused, [x, *_trained(adapters)], out)
        assert fused.grad_fn is not None and "JointLoRALinear" in type(fused.grad_fn).__name__
        for adapter in adapters:
            adapter.dropout, adapter.dropout_seed = Dropout(element=1e-9), 1  # drops nothing, by the plain path
        plain = joint(x)
        expected = torch.autograd.grad(plain, [x, *_trained(adapters)], out)
        assert "JointLoRALinear" not in type(plain.grad_fn).__name__

    # float32 sums of 6 to 9 products of size 1 to 10, in another order
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-4)


def _trained(adapters: Sequence[Adapter]) -> list[nn.Parameter]:
    return [parameter for adapter in adapters for parameter in adapter.trained()]


def joint_of(base: Layer, adapters: Sequence[Adapter]) -> tuple[JointAdapters, JointLayout]:
    layout = JointLayout()
    return JointAdapters(base, layout, dict(enumerate(adapters))), layout


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_each_training_gets_its_own_outputs_and_gradients(layer: str) -> None:
    base = make_layer(layer)
    adapters = make_adapters(base)
    joint, layout = joint_of(base, adapters)
    shares = [(2, 1), (0, 2), (9, 1), (1, 1), (3, 2)]  # 9 has no adapter here
    x = make_input(base, 7).requires_grad_()
    with layout.divided(shares):
        output = joint(x)
        output.square().sum().backward()
    together = {number: [p.grad.clone() for p in adapters[number].trained()] for number in range(4)}
    x_together = x.grad.clone()

    first = 0
    for number, rows in shares:
        for parameter in adapters[number].trained() if number < 4 else ():
            parameter.grad = None
        part = x.detach()[first : first + rows].requires_grad_()
        alone = adapters[number](part) if number < 4 else base(part)
        alone.square().sum().backward()
        # float32 sums of up to 54 terms of size 1 to 10, in another order
        torch.testing.assert_close(output[first : first + rows], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x_together[first : first + rows], part.grad, rtol=1e-4, atol=1e-3)
        if number < 4:
            for parameter, gradient in zip(adapters[number].trained(), together[number], strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-2)
        first += rows


def test_with_one_training_in_the_layout_it_is_that_adapter_bit_for_bit() -> None:
    base = make_layer("linear")
    adapters = make_adapters(base)
    joint, layout = joint_of(base, adapters)
    x = make_input(base, 5)
    for number, adapter in enumerate(adapters):
        with layout.only(number):
            assert torch.equal(joint(x), adapter(x))
    assert torch.equal(joint(x), base(x)), "outside it is the base"


def test_the_base_is_computed_once_for_all() -> None:
    base = make_layer("conv")
    joint, layout = joint_of(base, make_adapters(base))
    batches: list[int] = []
    base.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    with layout.divided([(0, 1), (1, 2), (2, 1), (3, 1)]):
        joint(make_input(base, 5))

    assert batches == [5]


def test_layouts_nest_and_end_with_an_error() -> None:
    layout = JointLayout()
    with pytest.raises(RuntimeError, match="stop"), layout.divided([(0, 1), (1, 1)]):
        with layout.only(1):
            assert [number for number, _ in layout.shares] == [1]
        assert [number for number, _ in layout.shares] == [0, 1]
        raise RuntimeError("stop")

    assert layout.shares == ()


def test_a_training_that_drops_its_adapter_leaves_the_others_alone() -> None:
    base = make_layer("linear")
    adapters = make_adapters(base)
    joint, layout = joint_of(base, adapters)
    x = make_input(base, 2)
    adapters[1].dropout = Dropout(module=0.99)
    adapters[1].dropout_seed = next(seed for seed in range(9) if _drops(adapters[1], seed))
    with layout.divided([(0, 1), (1, 1)]):
        output = joint(x)

    # float32: one row or two in a product of 6 terms
    torch.testing.assert_close(output[0], adapters[0](x[:1])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[1], base(x[1:])[0], rtol=1e-5, atol=1e-5)


def _drops(adapter: Adapter, seed: int) -> bool:
    adapter.dropout_seed = seed
    return adapter.is_dropped()


def test_rows_that_nobody_has_are_an_error() -> None:
    base = make_layer("linear")
    joint, layout = joint_of(base, make_adapters(base))
    with layout.divided([(0, 1), (1, 1)]), pytest.raises(RuntimeError, match="split"):
        joint(make_input(base, 3))


def test_joining_wraps_each_layer_once_whichever_trainings_have_it() -> None:
    root = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "c": nn.Linear(6, 8)})
    layers = select_layers(root, ["^[ab]$"])
    first = {path: ADAPTERS["lora"](layer, 2, 2.0) for path, layer in layers.items()}
    second = {"b": ADAPTERS["dora"](layers["b"], 2, 2.0)}
    joined = join(root, [first, second], JointLayout())

    assert set(joined) == {"a", "b"}
    assert root["b"] is joined["b"] and joined["b"].base is layers["b"]
    assert set(select_layers(root, [".*"])) == {"c"}, "a joined layer is not offered again"
    assert not next(iter(root["b"].parameters())).requires_grad
    assert len(list(root.parameters())) == 6, "adapters are no part of the model that one training freezes"


def test_an_adapter_of_another_layer_is_refused() -> None:
    adapter = make_adapters(make_layer("linear"))[0]
    with pytest.raises(ValueError, match="another layer"):
        JointAdapters(make_layer("linear"), JointLayout(), {0: adapter})


def layer_with_copies(
    index: int, dtype: torch.dtype, layout: JointLayout, *, bias: bool
) -> tuple[JointAdapters, list[LoRA]]:
    """A linear layer and the LoRAs of three trainings on it, which read copies in its dtype."""
    base = nn.Linear(16, 24, bias=bias)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3, generator=stream(index, "base", parameter.ndim))
    loras = [LoRA(base.to(dtype), 4, 6.0) for _ in range(3)]
    for number, lora in enumerate(loras):
        down, up = (
            torch.randn(p.shape, generator=stream(index, "factors", number, p.shape[0])).to(dtype).requires_grad_()
            for p in lora.trained()
        )
        lora.copies = (down, up)
    return JointAdapters(base, layout, dict(enumerate(loras))), loras


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_loras_of_equal_shapes_are_computed_at_once_to_the_same_numbers(
    count: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Tolerances: relative errors of norms that some roundings make."""
    layout = JointLayout()
    made = [layer_with_copies(index, dtype, layout, bias=count == 1) for index in range(count)]
    layers = [layer for layer, _ in made]
    leaves = [factor for _, loras in made for lora in (loras[2], loras[0]) for factor in lora.copies or ()]
    x = torch.randn(4, 5, 16, generator=stream(0, "x")).to(dtype).requires_grad_()
    directions = [torch.randn(4, 5, 24, generator=stream(index, "out")).to(dtype) for index in range(count)]
    apart = [torch.cat([loras[2](x[:2]), loras[0](x[2:])]) for _, loras in made]
    expected = torch.autograd.grad(apart, [x, *leaves], directions)
    frozen = [layer.base.weight.clone() for layer in layers]
    with layout.divided([(2, 2), (0, 2)]):  # 1 is not there
        if count == 1:
            outputs = (layers[0](x),)
        else:
            assert can_join_together(layers)
            outputs = JointTogether(layers)(x)
        assert all("Stacked" in type(output.grad_fn).__name__ for output in outputs)
        gradients = torch.autograd.grad(outputs, [x, *leaves], directions)

    assert all(torch.equal(layer.base.weight, weight) for layer, weight in zip(layers, frozen, strict=True))
    for got, want in zip([*outputs, *gradients], [*apart, *expected], strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("lies_last", [True, False], ids=["channels last", "channels first"])
def test_loras_of_a_pointwise_convolution_are_those_of_each_training_alone(lies_last: bool) -> None:
    """As around the transformers of Stable Diffusion 1.x, whose channels lie last where it is fast."""
    layout = JointLayout()
    base = nn.Conv2d(16, 24, 1).bfloat16().requires_grad_(False)
    loras = [LoRA(base, 4, 6.0) for _ in range(2)]
    for number, lora in enumerate(loras):
        down, up = (
            torch.randn(p.shape, generator=stream(number, "factors", p.shape[0])).bfloat16().requires_grad_()
            for p in lora.trained()
        )
        lora.copies = (down, up)
    layer = JointAdapters(base, layout, dict(enumerate(loras)))
    leaves = [factor for lora in loras for factor in lora.copies or ()]
    x = torch.randn(4, 16, 3, 5, generator=stream(0, "x")).bfloat16()
    x = (x.contiguous(memory_format=torch.channels_last) if lies_last else x).requires_grad_()
    direction = torch.randn(4, 24, 3, 5, generator=stream(0, "out")).bfloat16()
    apart = torch.cat([loras[0](x[:2]), loras[1](x[2:])])
    expected = torch.autograd.grad(apart, [x, *leaves], direction)
    with layout.divided([(0, 2), (1, 2)]):
        output = layer(x)
        gradients = torch.autograd.grad(output, [x, *leaves], direction)

    for got, want in zip([output, *gradients], [apart, *expected], strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() < 0.02 * want.norm()  # some roundings to bfloat16


def test_what_differs_is_computed_one_training_after_the_other() -> None:
    layout = JointLayout()
    made = [layer_with_copies(index, torch.bfloat16, layout, bias=False) for index in range(2)]
    layers = [layer for layer, _ in made]
    assert can_join_together(layers)
    together = JointTogether(layers)
    x = torch.randn(4, 5, 16, generator=stream(0, "x")).to(torch.bfloat16)

    def is_stacked(*shares: tuple[int, int]) -> bool:
        with layout.divided(shares):
            outputs = together(x[: sum(rows for _, rows in shares)])
            return all("Stacked" in type(output.grad_fn).__name__ for output in outputs)

    assert is_stacked((0, 1), (1, 1), (2, 1))
    assert not is_stacked((0, 1), (1, 3))
    assert not is_stacked((0, 4)), "as alone"
    made[1][1][1].alpha = 3.0
    assert not is_stacked((0, 2), (1, 2)), "of other scale"
    assert is_stacked((0, 2), (2, 2))
    made[0][1][2].copies = None
    assert not is_stacked((0, 2), (2, 2)), "without copies"
    assert not can_join_together([*layers, nn.Linear(16, 24)])
    assert not can_join_together([layer_with_copies(0, torch.bfloat16, layout, bias=True)[0]])
