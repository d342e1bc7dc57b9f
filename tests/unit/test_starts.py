"""PiSSA and OLoRA: adapters that start from parts of the frozen weight, and files that suit the untouched base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Layer, changed_weight
from lora_diffusion.adapters.dora import DoRA
from lora_diffusion.adapters.initialise import principal_svd
from lora_diffusion.adapters.kinds import ADAPTERS, adapter_from_tensors
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.models.base import Part
from lora_diffusion.streams import stream

STARTS = ("pissa", "olora")
LAYERS = ("linear", "conv1x1", "conv3x3")
RANK, ALPHA = 4, 6.0
starts = pytest.mark.parametrize("init", STARTS)
layers = pytest.mark.parametrize("layer", LAYERS)
kinds = pytest.mark.parametrize("kind", ["lora", "dora"])


def decaying(rows: int, columns: int, power: float = 0.5) -> Tensor:
    """A random matrix whose singular values fall slowly, as those of trained layers do."""
    generator = stream(0, "weight", rows, columns)
    u = torch.linalg.qr(torch.randn((rows, min(rows, columns)), generator=generator)).Q
    v = torch.linalg.qr(torch.randn((columns, min(rows, columns)), generator=generator)).Q
    return u * torch.arange(1, min(rows, columns) + 1).pow(-power) @ v.T


def make_layer(name: str, inputs: int = 24, outputs: int = 40) -> Layer:
    layer: Layer
    if name == "linear":
        layer = nn.Linear(inputs, outputs)
    else:
        layer = nn.Conv2d(inputs, outputs, 1) if name == "conv1x1" else nn.Conv2d(inputs, outputs, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(decaying(outputs, layer.weight[0].numel()).reshape(layer.weight.shape))
        layer.bias.copy_(torch.randn(outputs, generator=stream(0, "bias")))
    return layer


def make_input(layer: Layer) -> Tensor:
    shape = (2, 5, layer.weight.shape[1]) if isinstance(layer, nn.Linear) else (2, layer.weight.shape[1], 6, 6)
    return torch.randn(shape, generator=stream(0, "x"))


def trained(adapter: nn.Module, x: Tensor, steps: int = 5) -> None:
    """A few real steps towards another output."""
    target = torch.randn(adapter(x).shape, generator=stream(0, "target"))
    optimizer = torch.optim.AdamW(adapter.trained(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapter(x) - target).square().mean().backward()
        optimizer.step()


@kinds
@starts
@layers
def test_the_start_is_the_base_although_the_factors_are_not_0(kind: str, init: str, layer: str) -> None:
    base = make_layer(layer)
    x = make_input(base)
    adapter = ADAPTERS[kind](base, RANK, ALPHA, generator=stream(0, "init"), init=init)
    assert torch.equal(adapter(x), base(x))
    assert not adapter.delta().any()
    assert all(bool(parameter.any()) for parameter in adapter.trained())


@layers
def test_pissa_starts_from_the_best_part_of_the_weight_of_that_rank(layer: str) -> None:
    lora = LoRA(make_layer(layer), RANK, ALPHA, generator=stream(0, "init"), init="pissa")
    u, s, vh = torch.linalg.svd(lora.base.weight.flatten(1))
    best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    product = lora.scale * lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1)
    torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5)
    # shared evenly (equation 2): each factor has the roots of the singular values
    for factor in (lora.lora_up.weight.flatten(1).T, lora.lora_down.weight.flatten(1)):
        torch.testing.assert_close(factor @ factor.T, torch.diag(s[:RANK] / lora.scale), rtol=1e-4, atol=1e-5)


@layers
def test_olora_starts_from_the_first_directions_of_the_qr_decomposition(layer: str) -> None:
    lora = LoRA(make_layer(layer), RANK, ALPHA, generator=stream(0, "init"), init="olora")
    q, r = torch.linalg.qr(lora.base.weight.flatten(1))
    torch.testing.assert_close(lora.lora_up.weight.flatten(1), q[:, :RANK])
    torch.testing.assert_close(lora.lora_down.weight.flatten(1), r[:RANK])


@pytest.mark.parametrize("size", [(300, 700), (700, 300)])
@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("power", [0.25, 1.0])
def test_large_matrices_lose_less_than_a_percent_of_the_best_part(
    size: tuple[int, int], rank: int, power: float
) -> None:
    """These are past the size up to which the decomposition is exact."""
    matrix = decaying(*size, power)
    u, s, vh = principal_svd(matrix, rank, stream(0, "svd"))
    best = torch.linalg.svdvals(matrix)[:rank]
    assert (u.shape, s.shape, vh.shape) == ((size[0], rank), (rank,), (rank, size[1]))
    left = (matrix - u * s @ vh).square().sum()
    captured = 1 - left / matrix.square().sum()
    assert captured > 0.99 * best.square().sum() / matrix.square().sum()
    # float32 orthogonality
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(vh @ vh.T, torch.eye(rank), rtol=0, atol=1e-4)


def test_the_part_found_in_a_large_matrix_is_a_function_of_the_generator() -> None:
    matrix = decaying(300, 400)
    before = torch.get_rng_state()
    found = [principal_svd(matrix, 8, stream(seed, "svd")) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@kinds
@starts
@layers
def test_the_file_on_the_untouched_base_is_the_trained_model(kind: str, init: str, layer: str) -> None:
    base = make_layer(layer)
    x, weight = make_input(base), base.weight.detach().clone()
    adapter = ADAPTERS[kind](base, RANK, ALPHA, generator=stream(0, "init"), init=init)
    trained(adapter, x)
    assert torch.equal(base.weight, weight), "training never touches the base"

    tensors = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    assert tensors["lora_down.weight"].shape[0] == tensors["lora_up.weight"].shape[1] == 2 * RANK
    assert tensors["alpha"].item() / (2 * RANK) == ALPHA / RANK
    assert not any(name.startswith("start") for name in tensors)
    fresh = make_layer(layer)
    again = adapter_from_tensors(fresh, tensors)
    assert type(again) is type(adapter)
    change = (adapter(x) - base(x)).detach()
    assert change.abs().max() > 0.01
    assert (again(x) - adapter(x)).abs().max() < 1e-5 * adapter(x).abs().max()
    assert (changed_weight(again) - changed_weight(adapter)).abs().max() < 1e-5 * weight.abs().max()


@starts
@layers
def test_half_precision_costs_the_file_less_than_a_thousandth_of_the_change(init: str, layer: str) -> None:
    """fp16 has 11 bits, an error of 2⁻¹² at most per factor.

    The difference of two rounded products would lose as much of the part of the weight that both share, which is many
    times as large as the change.
    """
    lora = LoRA(make_layer(layer), RANK, ALPHA, generator=stream(0, "init"), init=init)
    trained(lora, make_input(lora.base), steps=1)
    change = lora.delta()
    halves = {name: t.half() if t.ndim else t for name, t in lora.tensors().items()}
    again = LoRA.from_tensors(make_layer(layer), halves)
    lost = (again.delta() - change).norm()
    assert lost < 1e-3 * change.norm()

    assert lora.start_down is not None and lora.start_up is not None
    naive = [
        lora.scale * up.half().float().flatten(1) @ down.half().float().flatten(1)
        for up, down in ((lora.lora_up.weight, lora.lora_down.weight), (lora.start_up, lora.start_down))
    ]
    assert ((naive[0] - naive[1]) - change.flatten(1)).norm() > 5 * lost


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_half_precision_costs_the_file_of_a_dora_as_little(init: str, tmp_path: Path) -> None:
    """Only because magnitudes stay float32: rounded ones would change every weight by up to 2⁻¹² of itself."""
    root = nn.ModuleDict({"proj_in": make_layer("linear")})
    dora = DoRA(root["proj_in"], RANK, ALPHA, generator=stream(0, "init"), init=init)
    trained(dora, make_input(dora.base))
    parts = {"unet": Part(root, "lora_unet")}
    file = AdapterFile.collect(parts, {"unet": {"proj_in": dora}})
    file.write(tmp_path / "a.safetensors", dtype=torch.float16)
    (tensors,) = AdapterFile.read(tmp_path / "a.safetensors").modules.values()
    assert tensors["lora_up.weight"].dtype == torch.float16
    assert tensors["dora_scale"].dtype == torch.float32
    again = adapter_from_tensors(make_layer("linear"), tensors)
    assert (again.delta() - dora.delta()).norm() < 1e-3 * dora.delta().norm()


@starts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_start_is_the_base_in_half_precision_too(init: str, dtype: torch.dtype) -> None:
    base = make_layer("linear").to(dtype)
    x = make_input(base).to(dtype)
    lora = LoRA(base, RANK, ALPHA, generator=stream(0, "init"), init=init)
    assert torch.equal(lora(x), base(x))
    assert lora.lora_down.weight.dtype == torch.float32


@starts
def test_a_rank_above_the_layers_is_refused(init: str) -> None:
    with pytest.raises(ValueError, match="rank is 25, but a layer of 40 x 24 has at most 24"):
        LoRA(make_layer("linear"), 25, 25, init=init)
    full = LoRA(make_layer("linear"), 24, 24, init=init)
    product = full.lora_up.weight @ full.lora_down.weight
    torch.testing.assert_close(product, full.base.weight, rtol=1e-4, atol=1e-5)  # all of it


@starts
def test_a_checkpoint_holds_what_the_start_was(init: str) -> None:
    """The base alone would do, but a decomposition on another machine may differ in its last bits."""
    lora = LoRA(make_layer("linear"), RANK, ALPHA, generator=stream(0, "init"), init=init)
    assert lora.state().keys() == {"lora_down.weight", "lora_up.weight", "start_down", "start_up"}
    dora = DoRA(make_layer("linear"), RANK, ALPHA, init=init)
    assert dora.state().keys() == lora.state().keys() | {"dora_scale"}


def test_weight_decay_is_only_for_weights_whose_0_changes_nothing() -> None:
    base = make_layer("linear")
    for kind in ADAPTERS:
        adapter = ADAPTERS[kind](base, RANK, ALPHA)
        assert len(adapter.undecayed()) == (1 if kind == "dora" else 0)
    for init in STARTS:
        for kind in ("lora", "dora"):
            adapter = ADAPTERS[kind](base, RANK, ALPHA, init=init)
            assert {id(p) for p in adapter.undecayed()} == {id(p) for p in adapter.trained()}
