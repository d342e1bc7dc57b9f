from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.inject import TARGETS, eject, inject, merge, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.errors import UserError
from lora_diffusion.streams import stream


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])
        self.norm = nn.LayerNorm(8)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=stream(0, "weights", *parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.to_out[0](self.to_q(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.attn1 = Attention()
        self.attn2 = Attention()
        self.eval()


def model() -> Model:
    return Model()


def make(path: str, layer: Layer) -> LoRA:
    lora = LoRA(layer, 2, 2.0)
    nn.init.normal_(lora.lora_up.weight, generator=stream(0, "up", path))
    return lora


def paths(*names: str) -> list[str]:
    return list(names)


def test_expressions_are_found_anywhere_in_the_path_and_layers_come_in_the_models_order() -> None:
    assert list(select_layers(model(), ["to_out", "attn1"])) == paths("attn1.to_q", "attn1.to_out.0", "attn2.to_out.0")


def test_a_named_target_selects_by_path() -> None:
    root = nn.ModuleDict({"block": model()})
    assert list(select_layers(root, "attention")) == [
        f"block.attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_out.0")
    ]


def test_an_expression_that_finds_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"'to_qq' is found in no path of the 5 .* layers of Model.*'attn1.to_out.0'"):
        select_layers(model(), ["to_q", "to_qq"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atention", "'atention' is not one of attention, attention-mlp, full"),
        (["to_(q"], "'to_\\(q' is not a regular expression"),
        ([], "selects no layer of Model"),
    ],
)
def test_bad_targets_are_explained(targets: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_layers(model(), targets)


def test_a_named_target_without_a_layer_is_an_error() -> None:
    with pytest.raises(UserError, match="'attention' selects no layer of Sequential"):
        select_layers(nn.Sequential(nn.Linear(2, 2)), "attention")


def test_every_named_target_contains_the_smaller_one() -> None:
    assert len(TARGETS) == 3
    assert set(TARGETS["attention"]) < set(TARGETS["attention-mlp"]) < set(TARGETS["full"])


def test_wrapped_layers_and_the_layers_of_adapters_are_not_selected() -> None:
    root = model()
    inject(root, select_layers(root, ["attn1.to_q"]), make)
    inject(root, select_layers(root, ["attn2.to_q"]), lambda _, layer: AdapterStack(layer))
    assert list(select_layers(root, [""])) == paths("conv_in", "attn1.to_out.0", "attn2.to_out.0")


def test_injected_adapters_show_in_the_model_under_the_layers_path() -> None:
    root = model()
    adapters = inject(root, select_layers(root, ["to_out"]), make)
    assert list(adapters) == paths("attn1.to_out.0", "attn2.to_out.0")
    assert root.get_submodule("attn1.to_out.0") is adapters["attn1.to_out.0"]
    assert "LoRA" in str(root)
    assert [type(module) for module in root.attn1.to_out] == [LoRA, nn.Dropout]


def test_only_wrapped_layers_are_frozen() -> None:
    root = model()
    inject(root, select_layers(root, ["to_q"]), make)
    frozen = {name for name, parameter in root.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"attn{i}.to_q.base.{part}" for i in (1, 2) for part in ("weight", "bias")}


def test_an_adapter_takes_the_layers_mode() -> None:
    root = model()
    adapters = inject(root, select_layers(root, ["to_q"]), make)
    assert not any(adapter.training for adapter in adapters.values())


def test_a_failing_constructor_leaves_the_model_alone() -> None:
    root = model()
    before = str(root)

    def fail_at_the_second(path: str, layer: Layer) -> LoRA:
        if path.startswith("attn2"):
            raise RuntimeError("no memory")
        return make(path, layer)

    with pytest.raises(RuntimeError, match="no memory"):
        inject(root, select_layers(root, ["to_q"]), fail_at_the_second)
    assert str(root) == before


def test_layers_selected_before_another_injection_are_refused() -> None:
    root = model()
    layers = select_layers(root, ["to_q"])
    inject(root, layers, make)
    with pytest.raises(ValueError, match=r"attn1\.to_q"):
        inject(root, layers, make)


def test_ejecting_twice_is_refused() -> None:
    root = model()
    adapters = inject(root, select_layers(root, ["to_q"]), make)
    eject(root, adapters)
    with pytest.raises(ValueError, match=r"attn1\.to_q"):
        eject(root, adapters)


def test_stacks_are_ejected_like_adapters() -> None:
    root = model()
    layer = root.attn1.to_q
    stacks = inject(root, select_layers(root, ["attn1.to_q"]), lambda _, layer: AdapterStack(layer))
    eject(root, stacks)
    assert root.attn1.to_q is layer


def test_merging_into_bfloat16_rounds_once() -> None:
    root = model().to(torch.bfloat16)
    weight = root.attn1.to_q.weight.detach().clone()
    adapters: dict[str, Adapter] = dict(inject(root, select_layers(root, ["attn1.to_q"]), make))
    adapter = adapters["attn1.to_q"]
    adapter.strength = 0.3
    merge(root, adapters)
    assert root.attn1.to_q.weight.dtype == torch.bfloat16
    assert torch.equal(root.attn1.to_q.weight, (weight.float() + 0.3 * adapter.delta()).to(torch.bfloat16))


def test_merging_a_wrong_adapter_changes_no_weight() -> None:
    root = model()
    adapters: dict[str, Adapter] = dict(inject(root, select_layers(root, ["to_q"]), make))
    weight = adapters["attn1.to_q"].base.weight.clone()
    with pytest.raises(ValueError, match=r"attn2\.to_q"):
        merge(root, {**adapters, "attn2.to_q": adapters["attn1.to_q"]})
    assert torch.equal(adapters["attn1.to_q"].base.weight, weight)
