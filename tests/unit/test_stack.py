from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer, with_weight
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.stack import AdapterStack, StackWeights
from lora_diffusion.streams import stream


class FullDelta(LoRA):
    """The same change, by the way of kinds that have no cheaper one than delta."""

    forward = Adapter.forward
    change = Adapter.change


def make_layer(kind: str) -> Layer:
    layer: Layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=stream(0, "base", parameter.ndim))
    return layer


def make_adapter(base: Layer, seed: int, cls: type[LoRA] = LoRA) -> LoRA:
    adapter = cls(base, 2, 3.0, generator=stream(seed, "init"))
    nn.init.normal_(adapter.lora_up.weight, generator=stream(seed, "up"))
    return adapter


def make_stack(base: Layer, weights: StackWeights | None = None, cls: type[LoRA] = LoRA) -> AdapterStack:
    stack = AdapterStack(base, weights)
    stack.add("ink v1.0", make_adapter(base, 1, cls))
    stack.add("neon", make_adapter(base, 2, cls))
    return stack


def make_input(base: Layer, batch: int) -> Tensor:
    shape = (batch, 3, 6) if isinstance(base, nn.Linear) else (batch, 6, 4, 4)
    return torch.randn(shape, generator=stream(0, "x"))


VALUES = torch.tensor([[1.0, 0.0], [0.3, -0.5], [0.0, 0.0]])


@pytest.mark.parametrize("cls", [LoRA, FullDelta])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_image_sees_its_own_mix(kind: str, cls: type[LoRA]) -> None:
    base = make_layer(kind)
    stack = make_stack(base, cls=cls)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    x = make_input(base, 3)
    output = stack(x)
    for i, (ink, neon) in enumerate(VALUES.tolist()):
        weight = base.weight + ink * stack["ink v1.0"].delta() + neon * stack["neon"].delta()
        # float32 sums of up to 54 terms of size 1, in another order
        torch.testing.assert_close(output[i], with_weight(base, x[i : i + 1], weight)[0], rtol=1e-4, atol=1e-4)


def test_a_batch_for_guidance_repeats_the_images_in_whole_passes() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    x = make_input(base, 6)
    expected = torch.cat([stack(x[:3]), stack(x[3:])])
    torch.testing.assert_close(stack(x), expected)


def test_a_batch_that_is_no_multiple_of_the_images_is_refused() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    with pytest.raises(ValueError, match="batch of 4 is no multiple of the 3 images"):
        stack(make_input(base, 4))


def test_without_weights_or_with_zeros_only_the_output_is_the_base_bit_for_bit() -> None:
    base = make_layer("conv")
    stack = make_stack(base)
    x = make_input(base, 3)
    assert torch.equal(stack(x), base(x))
    stack.weights.set(["ink v1.0", "neon"], torch.zeros(3, 2))
    with torch.no_grad():
        stack["ink v1.0"].get_parameter("lora_up.weight").fill_(torch.nan)  # would show if it were computed
    assert torch.equal(stack(x), base(x))


def test_clearing_the_weights_gives_the_base_back() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["neon"], torch.ones(1, 1))
    x = make_input(base, 2)
    assert not torch.equal(stack(x), base(x))
    stack.weights.clear()
    assert torch.equal(stack(x), base(x))


def test_an_image_without_adapters_is_the_base_beside_images_with_some() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    x = make_input(base, 3)
    assert torch.equal(stack(x)[2], base(x)[2])


def test_columns_go_by_name_not_by_order_of_adding() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    x = make_input(base, 3)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    expected = stack(x)
    stack.weights.set(["neon", "unknown here", "ink v1.0"], torch.stack([VALUES[:, 1], torch.ones(3), VALUES[:, 0]], 1))
    torch.testing.assert_close(stack(x), expected)


def test_stacks_share_their_weights() -> None:
    weights = StackWeights()
    bases = [make_layer("linear"), make_layer("conv")]
    stacks = [make_stack(base, weights) for base in bases]
    weights.set(["neon"], torch.ones(2, 1))
    for base, stack in zip(bases, stacks, strict=True):
        x = make_input(base, 2)
        assert not torch.equal(stack(x), base(x))


def test_a_removed_adapter_has_no_effect() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES[:1])
    stack.remove("ink v1.0")
    assert list(stack.adapters) == ["neon"]
    x = make_input(base, 1)
    assert torch.equal(stack(x), base(x))


def test_gradients_reach_every_adapter_in_use_and_not_the_base() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    stack(make_input(base, 3)).square().mean().backward()
    assert base.weight.grad is None
    for adapter in stack.adapters.values():
        assert adapter.get_parameter("lora_down.weight").grad is not None


def test_a_half_precision_base_keeps_its_dtype() -> None:
    base = make_layer("linear").to(torch.bfloat16)
    stack = make_stack(base)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    assert stack(make_input(base, 3).to(torch.bfloat16)).dtype == torch.bfloat16


def test_bad_additions_and_weights_are_refused() -> None:
    base = make_layer("linear")
    stack = make_stack(base)
    with pytest.raises(ValueError, match="'neon' already"):
        stack.add("neon", make_adapter(base, 3))
    with pytest.raises(ValueError, match="another layer"):
        stack.add("other", make_adapter(make_layer("linear"), 3))
    with pytest.raises(ValueError, match=r"\(3, 2\); expected \(images, 1\)"):
        stack.weights.set(["neon"], VALUES)
    with pytest.raises(ValueError, match="named twice"):
        stack.weights.set(["neon", "neon"], VALUES)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_packed_adapters_of_different_ranks_equal_each_image_alone(kind: str) -> None:
    base = make_layer(kind)
    stack = AdapterStack(base)
    for seed, rank in enumerate((1, 2, 4)):
        adapter = LoRA(base, rank, 3.0, generator=stream(seed, "init"))
        nn.init.normal_(adapter.lora_up.weight, generator=stream(seed, "up"))
        stack.add(str(seed), adapter)
    values = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, -1.0], [0.0, 0.0, 0.0], [0.3, 0.3, 0.3]])
    x = make_input(base, 8)
    with torch.no_grad():
        stack.weights.set(["0", "1", "2"], values)
        together = stack(x)
        assert len(stack.weights.packed) == 1
        for row in range(8):
            stack.weights.set(["0", "1", "2"], values[row % 4 : row % 4 + 1])
            # float32 sums of up to 54 terms of size 1, in another order
            torch.testing.assert_close(together[row], stack(x[row : row + 1])[0], rtol=1e-5, atol=1e-5)
    stack.weights.clear()
    assert stack.weights.packed == {}, "nothing is kept for a batch that is over"


def test_other_kinds_are_computed_only_on_the_rows_that_use_them() -> None:
    base = make_layer("linear")
    stack = make_stack(base, cls=FullDelta)
    stack.weights.set(["ink v1.0", "neon"], VALUES)
    x = make_input(base, 6)
    x[2], x[5] = torch.nan, torch.nan  # the third image uses neither: its row must not reach the others
    with torch.no_grad():
        output = stack(x)
    assert torch.isfinite(output[[0, 1, 3, 4]]).all()


def test_an_adapter_that_joins_later_is_seen_at_once() -> None:
    base = make_layer("linear")
    stack = AdapterStack(base)
    stack.weights.set(["late"], torch.ones(1, 1))
    x = make_input(base, 1)
    with torch.no_grad():
        before = stack(x)
        stack.add("late", make_adapter(base, 1))
        assert not torch.equal(stack(x), before)
        stack.remove("late")
        assert torch.equal(stack(x), before)
