"""LoRA layers with one input computed together, against each by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lora_diffusion.adapters.inject import inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.together import Together, can_go_together
from lora_diffusion.models.attention import FasterOnGPU
from lora_diffusion.training.working_copies import WorkingCopies

DTYPES = [(torch.float64, 1e-12), (torch.bfloat16, 0.02)]
"""With the relative error of norms that some roundings make."""


def attention(dtype: torch.dtype, text_width: int | None = None, rank: int = 8) -> Attention:
    torch.manual_seed(0)
    layer = Attention(32, text_width, heads=4, dim_head=8, bias=False, processor=FasterOnGPU()).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    inject(layer, select_layers(layer, [".*"]), lambda _, base: LoRA(base, rank, rank * 1.5, generator=generator))
    for lora in loras(layer):
        for parameter in lora.trained():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer


def loras(root: nn.Module) -> list[LoRA]:
    return [module for module in root.modules() if isinstance(module, LoRA)]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_outputs_and_gradients_are_those_of_the_layers_by_themselves(
    count: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(2)
    layers = [LoRA(nn.Linear(16, 24, bias=False).to(dtype), 8, 4.0) for _ in range(count)]
    for lora in layers:
        for parameter in lora.trained():
            parameter.data = torch.randn(parameter.shape).to(dtype)
    x = draw(2, 5, 16, dtype=dtype, seed=3).requires_grad_()
    directions = [draw(2, 5, 24, dtype=dtype, seed=4 + index) for index in range(count)]
    expected = [lora(x) for lora in layers]
    wanted = torch.autograd.grad(expected, [x, *(p for lora in layers for p in lora.trained())], directions)

    frozen = [lora.base.weight.clone() for lora in layers]
    assert can_go_together(layers)
    group = Together(layers)
    with torch.no_grad():
        group.down.copy_(torch.cat([lora.lora_down.weight for lora in layers]))
        group.up.copy_(torch.stack([lora.lora_up.weight for lora in layers]))
    made = group(x)
    grad_x, grad_down, grad_up = torch.autograd.grad(made, [x, group.down, group.up], directions)

    assert all(torch.equal(lora.base.weight, weight) for lora, weight in zip(layers, frozen, strict=True))
    for got, want in zip(made, expected, strict=True):
        assert got.shape == want.shape and distance(got, want) < tolerance
    assert distance(grad_x, wanted[0]) < tolerance
    assert distance(grad_down, torch.cat(wanted[1::2])) < tolerance
    assert distance(grad_up, torch.stack(wanted[2::2])) < tolerance


@pytest.mark.parametrize(("text_width", "num_groups", "in_group"), [(None, 1, 3), (48, 1, 2)])
def test_attention_with_copies_is_attention_without(text_width: int | None, num_groups: int, in_group: int) -> None:
    plain = attention(torch.bfloat16, text_width)
    joined = copy.deepcopy(plain)
    copies = WorkingCopies(joined)
    flat = torch.zeros(sum(p.numel() for p in copies.parameters))
    x = draw(2, 6, 32, dtype=torch.bfloat16, seed=5)
    text = None if text_width is None else draw(2, 7, text_width, dtype=torch.bfloat16, seed=6)
    expected = plain(x, text)
    expected.float().square().sum().backward()
    with copies:
        groups = {id(lora.together): lora.together for lora in loras(joined) if lora.together is not None}
        made = joined(x, text)
        made.float().square().sum().backward()
        copies.gather(flat)

    assert [len(group.loras) for group in groups.values() if group is not None] == [in_group] * num_groups
    assert distance(made, expected) < 0.02
    own = {id(p): p for p in joined.parameters()}
    twins = dict(zip(own, plain.parameters(), strict=True))
    assert len(copies.parameters) == 2 * len(loras(plain))
    for part, parameter in zip(flat.split([p.numel() for p in copies.parameters]), copies.parameters, strict=True):
        want = twins[id(parameter)].grad
        assert want is not None and distance(part.view_as(parameter), want) < 0.03  # of sums of rounded products
    assert distance(joined(x, text), expected) < 0.02  # outside, with the parameters themselves


def test_what_differs_or_does_not_fit_the_matrix_units_stays_apart() -> None:
    def lora(
        outputs: int = 16, rank: int = 8, alpha: float = 8.0, *, bias: bool = False, init: str = "default"
    ) -> LoRA:
        return LoRA(nn.Linear(16, outputs, bias=bias), rank, alpha, init=init)

    assert can_go_together([lora(), lora()])
    assert not can_go_together([lora(), None])
    assert not can_go_together([lora(), lora(outputs=24)])
    assert not can_go_together([lora(), lora(rank=16)])
    assert not can_go_together([lora(), lora(alpha=4.0)])
    assert not can_go_together([lora(bias=True)])
    assert not can_go_together([lora(init="pissa")])
    assert not can_go_together([lora(rank=4)] * 3)
    dropped = lora()
    dropped.dropout_seed = 1
    assert not can_go_together([dropped])
