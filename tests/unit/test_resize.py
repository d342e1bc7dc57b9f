"""Lower ranks: as near as can be, in shapes and strengths that every reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.adapters.geometry import geometry_of
from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.tools.convert import with_usual_names
from lora_diffusion.tools.deltas import delta_of
from lora_diffusion.tools.plain_lora import kernel_of
from lora_diffusion.tools.resize import resize_file
from tests.adapter_parts import (
    CONV,
    PROJ_IN,
    TE,
    K,
    Parts,
    Q,
    loha,
    loha_tucker,
    lokr,
    lora,
    randn,
    saved,
    sd1_modules,
    sdxl_modules,
    tucker,
)

FLOAT32 = 1e-6  # of a relative error: the factors that are written are float32


def dense(parts: Parts) -> Tensor:
    return delta_of(parts, geometry_of({part: tuple(tensor.shape) for part, tensor in parts.items()})).double()


def resized(path: Path, **options: int | float) -> AdapterFile:
    target = path.with_name("resized.safetensors")
    resize_file(path, target, overwrite=True, **options)  # pyright: ignore
    return AdapterFile.read(target)


@pytest.mark.parametrize(
    "modules",
    [
        {Q: lora(rank=6)},
        {CONV: lora(kernel=(3, 3), rank=6)},
        {CONV: tucker()},
        {Q: loha()},
        {CONV: loha(columns=72)},
        {CONV: loha_tucker()},
        {Q: lokr("whole")},
        {CONV: lokr("tucker", kernel=(3, 3))},
    ],
    ids=["lora", "convolution", "Tucker", "loha", "loha of a convolution", "loha Tucker", "lokr", "lokr Tucker"],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_the_tail_of_the_singular_values(tmp_path: Path, modules: dict[str, Parts], rank: int) -> None:
    ((name, parts),) = modules.items()
    source = saved(tmp_path / "a.safetensors", modules)
    report = resize_file(source, tmp_path / "b.safetensors", rank=rank)
    delta = dense(parts)
    s = torch.linalg.svdvals(delta)
    tail = math.sqrt(float(s[rank:].square().sum() / s.square().sum()))
    written = AdapterFile.read(tmp_path / "b.safetensors")

    assert report.modules[0].error == pytest.approx(tail, abs=FLOAT32)
    assert report.error == pytest.approx(tail, abs=FLOAT32)
    assert float((dense(dict(written.modules[name])) - delta).norm() / delta.norm()) == pytest.approx(tail, abs=FLOAT32)
    assert written.geometries[name].rank == rank
    assert written.kinds == {"lora": 1}


def test_the_error_counts_the_rounding_of_what_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: lora()}, dtype=torch.float16)
    report = resize_file(source, tmp_path / "b.safetensors", rank=4)
    before = dense(dict(AdapterFile.read(source).modules[Q]))
    after = dense(dict(AdapterFile.read(tmp_path / "b.safetensors").modules[Q]))

    assert report.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert 1e-5 < report.error < 1e-3  # float16 has 11 bits


def test_energy_finds_the_smallest_rank_of_each_module(tmp_path: Path) -> None:
    modules = {Q: lora(rank=6), TE: lora(20, 16, rank=6, seed=4)}
    file = resized(saved(tmp_path / "a.safetensors", modules), energy=0.8)

    for name, parts in modules.items():
        shares = torch.linalg.svdvals(dense(parts)).square()
        held = (shares.cumsum(0) / shares.sum()).tolist()
        rank = file.geometries[name].rank
        assert held[rank - 1] >= 0.8
        assert rank == 1 or held[rank - 2] < 0.8


def test_all_of_the_energy_is_the_whole_change(tmp_path: Path) -> None:
    report = resize_file(saved(tmp_path / "a.safetensors", {Q: lora()}), tmp_path / "b.safetensors", energy=1.0)

    assert report.error < FLOAT32
    assert report.modules[0].ranks == (4, 4)


def test_convolutions_may_have_a_rank_of_their_own(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", sd1_modules())
    file = resized(source, rank=2, conv_rank=3)

    assert {name: geometry.rank for name, geometry in file.geometries.items()} == {
        Q: 2, K: 2, PROJ_IN: 2, CONV: 3, TE: 2,
    }  # fmt: skip


def test_one_alpha_for_all_modules_and_scale_1_where_the_rank_is_the_usual(tmp_path: Path) -> None:
    file = resized(saved(tmp_path / "a.safetensors", sd1_modules()), rank=3)

    assert {geometry.rank for geometry in file.geometries.values()} == {2, 3}
    assert {parts["alpha"].item() for parts in file.modules.values()} == {3.0}


def test_a_rank_above_what_a_module_holds_leaves_it_as_it_is(tmp_path: Path) -> None:
    file = resized(saved(tmp_path / "a.safetensors", sd1_modules()), rank=64)

    for name, parts in sd1_modules().items():
        torch.testing.assert_close(dense(dict(file.modules[name])), dense(parts), rtol=0, atol=2e-5)
        assert file.modules[name]["lora_down.weight"].shape == parts["lora_down.weight"].shape
        assert file.modules[name]["lora_up.weight"].shape == parts["lora_up.weight"].shape


def test_sdxl_keeps_its_names(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", sdxl_modules(ldm=True))
    resize_file(source, tmp_path / "b.safetensors", rank=2)

    assert load_file(tmp_path / "b.safetensors").keys() == load_file(source).keys()


def test_a_change_of_nothing_stays_nothing(tmp_path: Path) -> None:
    parts = lora()
    parts["lora_up.weight"].zero_()
    report = resize_file(saved(tmp_path / "a.safetensors", {Q: parts}), tmp_path / "b.safetensors", rank=2)

    assert report.error == 0
    assert not dense(dict(AdapterFile.read(tmp_path / "b.safetensors").modules[Q])).any()


@pytest.mark.parametrize(
    ("name", "family", "kernel"),
    [
        (CONV, "sd1", (3, 3)),
        (CONV.replace("conv1", "conv2"), "", (3, 3)),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "sdxl", (3, 3)),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "sd2", (3, 3)),
        ("lora_unet_conv_in", "sd1", (3, 3)),
        (CONV.replace("conv1", "conv_shortcut"), "sdxl", (1, 1)),
        (CONV.replace("conv1", "time_emb_proj"), "sd1", ()),
        (PROJ_IN, "sd1", (1, 1)),
        (PROJ_IN, "", (1, 1)),
        (PROJ_IN, "sd2", ()),
        (PROJ_IN, "sdxl", ()),
        (Q, "sd1", ()),
        (TE, "sd1", ()),
    ],
)
def test_flat_factors_get_the_kernel_of_their_layer(name: str, family: str, kernel: tuple[int, ...]) -> None:
    assert kernel_of(AdapterFile({name: loha(columns=72)}, family=family), name) == kernel


def test_shapes_that_are_there_count_more_than_names() -> None:
    assert kernel_of(AdapterFile({Q: lokr("whole", kernel=(3, 3))}), Q) == (3, 3)
    assert kernel_of(AdapterFile({PROJ_IN: lora()}, family="sd1"), PROJ_IN) == ()


def test_a_width_that_is_no_3x3_convolution_is_refused() -> None:
    with pytest.raises(UserError, match="no multiple of 9"):
        kernel_of(AdapterFile({CONV: loha(columns=8)}), CONV)


def test_a_dora_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: lora() | {"dora_scale": randn(1, 8)}})

    with pytest.raises(UserError, match=r"cannot resize a DoRA \(1 of 1 modules.*without the base"):
        resize_file(source, tmp_path / "b.safetensors", rank=2)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give one of the two"),
        ({"rank": 2, "energy": 0.5}, "give one of the two"),
        ({"energy": 0.5, "conv_rank": 2}, "--conv-rank goes with --rank"),
        ({"rank": 0}, "1 or more"),
        ({"energy": 0.0}, "above 0"),
        ({"energy": 1.1}, "at most 1"),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, options: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)  # pyright: ignore


def test_the_file_says_how_it_was_made_and_keeps_what_was_said(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: loha()}, {"ss_output_name": "ink", "ss_network_dim": "99"})
    resize_file(source, tmp_path / "b.safetensors", rank=3)
    metadata = read_header(tmp_path / "b.safetensors").metadata

    assert json.loads(metadata["lora_diffusion.made_by"]) == {"command": "resize", "adapter": "a", "rank": 3}
    assert metadata["ss_output_name"] == "ink"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "3"
    assert str(tmp_path) not in str(metadata)


def test_a_file_of_lora_and_loha_becomes_all_lora(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: lora(), TE: loha()})

    assert resized(source, rank=2).kinds == {"lora": 2}
    assert with_usual_names(AdapterFile.read(source)).kinds == {"lora": 1, "loha": 1}
