"""Factors cast once for all layers, against layers that cast for themselves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.inject import eject, inject, join, select_layers
from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.training.working_copies import WorkingCopies


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype, init: str = "default") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.conv, self.last = nn.Linear(12, 8), nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6 * 4, 5)
        self.to(dtype)
        inject(self, select_layers(self, [".*"]), lambda _, layer: LoRA(layer, 4, 6.0, generator=generator, init=init))
        with torch.no_grad():
            for parameter in self.factors():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def factors(self) -> list[nn.Parameter]:
        return [p for lora in self.modules() if isinstance(lora, LoRA) for p in lora.trained()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x).reshape(-1, 2, 2, 2)).flatten(1)
        return self.last(x).float().square().mean()


def picture(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn((3, 12), generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients_by_copies(layers: Layers, inputs: list[Tensor]) -> list[Tensor]:
    copies = WorkingCopies(layers)
    assert [id(p) for p in copies.parameters] == [id(p) for p in layers.factors()]
    flat = torch.zeros(sum(p.numel() for p in copies.parameters))
    with copies:
        for x in inputs:
            layers(x).backward()
            copies.gather(flat)
    assert all(p.grad is None for p in layers.factors())
    parts = flat.split([p.numel() for p in copies.parameters])
    return [part.view_as(p) for part, p in zip(parts, copies.parameters, strict=True)]


def test_loss_and_gradients_are_bit_for_bit_those_of_layers_that_cast_for_themselves() -> None:
    plain = Layers(torch.bfloat16)
    copied = copy.deepcopy(plain)
    inputs = [picture(torch.bfloat16, seed) for seed in (1, 2)]
    losses = [plain(x) for x in inputs]
    for loss in losses:
        loss.backward()  # adds in float32, as gather does

    gradients = gradients_by_copies(copied, inputs)
    for parameter, gradient in zip(plain.factors(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert torch.equal(plain(inputs[0]), copied(inputs[0]))


def test_parameters_stay_the_same_objects_and_what_changes_them_is_read_at_the_next_step_and_outside() -> None:
    layers = Layers(torch.bfloat16)
    before = layers.factors()
    copies = WorkingCopies(layers)
    x = picture(torch.bfloat16, 1)
    outside = layers(x)
    with copies:
        assert torch.equal(layers(x), outside)
    optimizer = torch.optim.AdamW(layers.factors(), lr=0.1, fused=True)
    for parameter in layers.factors():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    changed = layers(x)
    assert not torch.equal(changed, outside)
    with copies:
        assert torch.equal(layers(x), changed)
    assert all(now is then for now, then in zip(layers.factors(), before, strict=True))


def test_an_adapter_without_effect_on_the_loss_gets_the_gradient_zero() -> None:
    layers = Layers(torch.bfloat16)
    copies = WorkingCopies(layers)
    flat = torch.zeros(sum(p.numel() for p in copies.parameters))
    with copies:
        layers.first(picture(torch.bfloat16, 1)).float().sum().backward()
        copies.gather(flat)
    own = sum(p.numel() for p in layers.first.trained())
    assert flat[:own].abs().sum() > 0 and flat[own:].abs().sum() == 0


def test_adapters_that_are_joined_into_the_layers_have_copies_too() -> None:
    plain = Layers(torch.bfloat16)
    joint, layout = copy.deepcopy(plain), JointLayout()
    adapters = {path: module for path, module in joint.named_modules() if isinstance(module, LoRA)}
    eject(joint, adapters)
    join(joint, [adapters], layout)
    assert WorkingCopies(joint).parameters == [], "they are no modules of the layers"
    copies = WorkingCopies(joint, adapters.values())
    flat = torch.zeros(sum(p.numel() for p in copies.parameters))
    x = picture(torch.bfloat16, 1)
    plain(x).backward()
    with copies, layout.only(0):
        joint(x).backward()
        copies.gather(flat)

    parts = flat.split([p.numel() for p in plain.factors()])
    for parameter, part in zip(plain.factors(), parts, strict=True):
        assert parameter.grad is not None and torch.equal(part.view_as(parameter), parameter.grad)


def test_float32_bases_and_starts_that_are_taken_off_again_have_no_copies() -> None:
    assert WorkingCopies(Layers(torch.float32)).parameters == []
    layers = Layers(torch.float32, init="pissa").to(torch.bfloat16)
    for parameter in layers.factors():
        parameter.data = parameter.data.float()
    assert WorkingCopies(layers).parameters == []
