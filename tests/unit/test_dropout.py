"""Dropout inside adapters: what is dropped is a function of the seed, and on average nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.base import Adapter, Dropout, Layer
from lora_diffusion.adapters.dora import DoRA
from lora_diffusion.adapters.kinds import ADAPTERS
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.streams import stream, stream_seed
from lora_diffusion.training.regularise import Regulariser

RANK, NUM_COPIES = 6, 2000
LAYERS: dict[str, Callable[[], Layer]] = {
    "linear": lambda: nn.Linear(10, 14),
    "conv": lambda: nn.Conv2d(10, 14, 3, padding=1),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def make_adapter(kind: str, layer: str, **options: str) -> Adapter:
    base = LAYERS[layer]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream(0, "base", *parameter.shape)))
    adapter = ADAPTERS[kind](base, RANK, 4.0, generator=stream(0, "init"), **options)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.trained()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=stream(index, "trained"))
    return adapter


def make_input(layer: str) -> Tensor:
    return torch.randn((2, 3, 10) if layer == "linear" else (2, 10, 3, 3), generator=stream(0, "x"))


def seeds(count: int) -> list[int]:
    return [stream_seed(0, "dropout", index) for index in range(count)]


@layers
@pytest.mark.parametrize("dropout", [Dropout(element=0.3), Dropout(rank=0.3), Dropout(element=0.2, rank=0.2)], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_the_mean_is_the_output_without_dropout(kind: str, dropout: Dropout, layer: str) -> None:
    adapter = make_adapter("lora", layer, init="pissa") if kind == "pissa" else make_adapter(kind, layer)
    x = make_input(layer)
    with torch.no_grad():
        expected = adapter(x)
        adapter.dropout, adapter.dropout_seed = dropout, 5
        copies = x.repeat(NUM_COPIES, *(1,) * (x.ndim - 1))  # each image of a batch is drawn apart
        differences = adapter(copies).unflatten(0, (NUM_COPIES, -1)) - expected
    assert differences.std(0).mean() > 0.05, "dropout does something"
    # one mean in a million is beyond 5 standard errors, and there are some 300
    assert (differences.mean(0).abs() <= 5 * differences.std(0) / NUM_COPIES**0.5).all()


@layers
def test_rank_dropout_leaves_out_whole_components_for_a_whole_image(layer: str) -> None:
    adapter = make_adapter("lora", layer)
    assert isinstance(adapter, LoRA)
    adapter.dropout, adapter.dropout_seed = Dropout(rank=0.5), 3
    change = adapter.change(make_input(layer), 1.0)
    axis = -1 if layer == "linear" else 1
    hidden = adapter.lora_down(make_input(layer))  # all components
    kept = adapter._kept(hidden, 3).expand_as(hidden).movedim(axis, 1).flatten(2)  # (B, r, places)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept == kept[..., :1]).all(), "the same at every place of an image"
    assert not torch.equal(kept[0], kept[1]), "images are drawn apart"
    torch.testing.assert_close(change, adapter.lora_up(hidden * adapter._kept(hidden, 3) * adapter.scale))


def test_both_halves_of_a_pissa_component_are_dropped_together() -> None:
    adapter = make_adapter("lora", "linear", init="pissa")
    assert isinstance(adapter, LoRA)
    adapter.dropout = Dropout(element=0.5, rank=0.3)
    kept = adapter._kept(torch.ones(2, 3, 2 * RANK), 7)
    assert torch.equal(kept[..., :RANK], kept[..., RANK:])
    assert 0 < (kept == 0).float().mean() < 1


@pytest.mark.parametrize("kind", ADAPTERS)
@layers
def test_module_dropout_leaves_the_base_as_often_as_it_says(kind: str, layer: str) -> None:
    adapter, x = make_adapter(kind, layer), make_input(layer)
    whole, base = adapter(x), adapter.base(x)
    adapter.dropout = Dropout(module=0.3)
    dropped = 0
    for seed in seeds(500):
        adapter.dropout_seed = seed
        output = adapter(x)
        dropped += torch.equal(output, base)
        assert torch.equal(output, base) or torch.equal(output, whole), "what stays is not scaled up"
    assert dropped / 500 == pytest.approx(0.3, abs=0.08)  # 4 standard errors
    adapter.dropout_seed = None
    assert torch.equal(adapter(x), whole)


def test_module_dropout_and_rank_dropout_are_independent() -> None:
    """Both are functions of one seed; from one stream, a kept adapter would keep its first component too often."""
    adapter = make_adapter("lora", "linear")
    assert isinstance(adapter, LoRA)
    adapter.dropout = Dropout(rank=0.5, module=0.5)
    kept = []
    for seed in seeds(2000):
        adapter.dropout_seed = seed
        if not adapter.is_dropped():
            kept.append(adapter._kept(torch.ones(1, 1, RANK), seed).flatten() > 0)
    assert len(kept) == pytest.approx(1000, abs=100)
    assert (torch.stack(kept).float().mean(0) - 0.5).abs().max() < 0.07  # 4 standard errors of 1000 draws


@layers
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointing_repeats_what_was_dropped(kind: str, layer: str) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        adapter = make_adapter(kind, layer)
        adapter.dropout, adapter.dropout_seed = Dropout(element=0.3, rank=0.3), 5
        x = make_input(layer).requires_grad_()
        output = checkpoint(adapter, x, use_reentrant=False) if is_checkpointed else adapter(x)
        output.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in adapter.trained())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_dora_drops_inside_and_stops_when_it_is_told_to() -> None:
    adapter, x = make_adapter("dora", "linear"), make_input("linear")
    assert isinstance(adapter, DoRA)
    expected = adapter(x)
    adapter.dropout, adapter.dropout_seed = Dropout(element=0.5), 5
    assert not torch.equal(adapter(x), expected)
    adapter.dropout_seed = None
    assert torch.equal(adapter(x), expected)


def test_what_is_dropped_depends_on_step_process_layer_and_seed() -> None:
    def drawn(step: int, process: int, seed: int) -> list[int | None]:
        adapters = {name: make_adapter("lora", "linear") for name in ("unet.a", "unet.b")}
        for adapter in adapters.values():
            adapter.dropout = Dropout(element=0.1)
        regulariser = Regulariser(adapters, seed)
        with regulariser.dropout(step, process):
            found = [adapter.dropout_seed for adapter in adapters.values()]
        assert all(adapter.dropout_seed is None for adapter in adapters.values())
        return found

    assert drawn(1, 0, 3) == drawn(1, 0, 3)
    everything = [*drawn(1, 0, 3), *drawn(2, 0, 3), *drawn(1, 1, 3), *drawn(1, 0, 4)]
    assert len(set(everything)) == 8


def test_adapters_without_dropout_get_no_seed() -> None:
    adapters = {"unet.a": make_adapter("lora", "linear")}
    with Regulariser(adapters, 0).dropout(0, 0):
        assert adapters["unet.a"].dropout_seed is None


def test_limits_count_what_they_changed() -> None:
    adapters = {f"unet.{i}": make_adapter("lora", "linear") for i in range(3)}
    adapters["unet.0"].scale_delta(1e-3)
    norm = adapters["unet.1"].delta_norm().item()
    assert Regulariser(adapters, 0).limit_norms() is None
    regulariser = Regulariser(adapters, 0, max_norm=norm / 2)
    assert regulariser.limit_norms() == 2
    assert regulariser.limit_norms() == 0
