"""`extract`: what was baked comes back, and what an adapter cannot hold is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.models.load import load_model
from lora_diffusion.tools.bake import bake_adapters
from lora_diffusion.tools.extract import ExtractSettings, extract_adapter, kept_by_part
from tests.hand_made import dense, randn, relative
from tests.random_adapters import random_adapter, written
from tests.single_file import make_single_file
from tests.tiny import make_tiny_sd1
from tests.unit.test_checkpoint_file import converted, sdxl_like

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_1_resnets_0_conv2"


@pytest.fixture(scope="module")
def adapter(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    """A rank 4 LoRA of the text encoder and of all layers in the UNet's blocks."""
    path = tmp_path_factory.mktemp("adapter") / "neon.safetensors"
    return written(random_adapter(load_model(tiny_sd1), seed=1, parts=("unet", "text_encoder"), targets="full"), path)


@pytest.fixture(scope="module")
def baked(tiny_sd1: Path, adapter: AdapterFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("baked") / "tuned"
    assert adapter.path is not None
    bake_adapters(tiny_sd1, [(adapter.path, 0.5)], out)
    return out


def edited(source: Path, target: Path, file: str, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the folder, in which `edit` changed the tensors of one file."""
    shutil.copytree(source, target)
    tensors = load_file(target / file)
    edit(tensors)
    save_file(tensors, target / file)
    return target


def test_what_was_baked_comes_back(tiny_sd1: Path, adapter: AdapterFile, baked: Path, tmp_path: Path) -> None:
    report = extract_adapter(tiny_sd1, baked, tmp_path / "out.safetensors", ExtractSettings(rank=4))
    file = AdapterFile.read(tmp_path / "out.safetensors")

    assert file.modules.keys() == adapter.modules.keys() and len(file.modules) > 100
    for name in file.modules:
        assert relative(dense(file.modules[name]), 0.5 * dense(adapter.modules[name])) < 1e-4  # W + ΔW is float32
        assert file.geometries[name].rank == 4 == file.modules[name]["alpha"].item()
    shapes = [tuple(file.modules[CONV][f"lora_{x}.weight"].shape) for x in ("down", "up")]
    assert shapes == [(4, 16, 3, 3), (16, 4, 1, 1)]
    assert report.unheld == [] and report.energy > 1 - 1e-8
    assert report.precision == torch.float32
    assert json.loads(file.metadata["lora_diffusion.made_by"])["tuned"] == "tuned"


def test_a_folder_and_a_single_file_may_be_compared(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    single = make_single_file(baked, tmp_path / "tuned.safetensors")
    extract_adapter(tiny_sd1, single, tmp_path / "a.safetensors", ExtractSettings(rank=2))
    extract_adapter(tiny_sd1, baked, tmp_path / "b.safetensors", ExtractSettings(rank=2))

    first, second = (load_file(tmp_path / f"{x}.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_each_rank_holds_the_best_it_can(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    settings = ExtractSettings(rank=2, conv_rank=3)
    report = extract_adapter(tiny_sd1, baked, tmp_path / "out.safetensors", settings)
    file = AdapterFile.read(tmp_path / "out.safetensors")

    base, tuned = BaseWeights.open(tiny_sd1), BaseWeights.open(baked)
    for name, rank in ((TO_Q, 2), (CONV, 3)):
        delta = (tuned.read(name).double() - base.read(name).double()).flatten(1)
        s = torch.linalg.svdvals(delta)
        layer = next(layer for layer in report.layers if layer.name == name)
        assert file.geometries[name].rank == rank == layer.rank
        assert layer.error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3)
        assert relative(dense(file.modules[name]), delta) == pytest.approx(layer.error, rel=1e-3)
    assert 0.3 < kept_by_part(report.layers)["unet"] < 1
    assert report.energy == pytest.approx(
        1 - sum(x.lost for x in report.layers) / sum(x.squared for x in report.layers)
    )


def test_energy_ends_a_rank_early(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    report = extract_adapter(tiny_sd1, baked, tmp_path / "out.safetensors", ExtractSettings(rank=64, energy=0.9))

    assert {layer.rank for layer in report.layers} <= {1, 2, 3, 4}
    assert all(layer.error**2 <= 0.1 for layer in report.layers)


def test_a_layer_bounds_its_rank(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    extract_adapter(tiny_sd1, baked, tmp_path / "out.safetensors", ExtractSettings(rank=1000))
    file = AdapterFile.read(tmp_path / "out.safetensors")

    assert all(g.rank == min(g.outputs, g.inputs) for g in file.geometries.values())


def test_what_no_adapter_holds_is_counted(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    changes = {
        "conv_in.weight": 0.1,
        "conv_out.bias": 0.2,
        "time_embedding.linear_1.weight": 0.3,
        "conv_norm_out.weight": 0.4,
    }

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, size in changes.items():
            tensors[name] += size * randn(*tensors[name].shape, seed=1)

    def retrain_token(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.token_embedding.weight"][5] += 1

    changed = edited(baked, tmp_path / "changed", UNET, edit)
    tuned = edited(changed, tmp_path / "tuned", TEXT, retrain_token)
    report = extract_adapter(tiny_sd1, tuned, tmp_path / "out.safetensors", ExtractSettings(rank=4))

    found = {entry.what: (entry.count, entry.squared) for entry in report.unheld}
    before, after = load_file(tiny_sd1 / UNET), load_file(tuned / UNET)
    squares = {name: float((after[name].double() - before[name].double()).square().sum()) for name in changes}
    assert found == {
        "first and last convolution": (1, pytest.approx(squares["conv_in.weight"])),
        "biases": (1, pytest.approx(squares["conv_out.bias"])),
        "time and size embedding": (1, pytest.approx(squares["time_embedding.linear_1.weight"])),
        "norm layers": (1, pytest.approx(squares["conv_norm_out.weight"])),
        "text embeddings": (1, pytest.approx(32)),
    }
    assert report.energy == pytest.approx(1 - sum(square for _, square in found.values()) / report.squared, rel=1e-6)
    assert CONV in AdapterFile.read(tmp_path / "out.safetensors").modules


def test_layers_that_are_the_same_are_left_out(tiny_sd1: Path, tmp_path: Path) -> None:
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    tuned = edited(tiny_sd1, tmp_path / "tuned", UNET, lambda tensors: tensors[key].mul_(1.1))
    report = extract_adapter(tiny_sd1, tuned, tmp_path / "out.safetensors", ExtractSettings(rank=4))

    assert AdapterFile.read(tmp_path / "out.safetensors").modules.keys() == {TO_Q}
    assert report.num_same > 100


def test_sdxl_is_written_in_the_names_of_sdxl(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = sdxl_like()
    save_file(tensors, tmp_path / "base.safetensors")
    for name in ("input_blocks.1.1.proj_in.weight", "input_blocks.4.0.in_layers.2.weight"):
        tensors[f"model.diffusion_model.{name}"] += 0.1
    tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"][:6] += 0.1
    save_file(tensors, tmp_path / "tuned.safetensors")
    inputs = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    extract_adapter(*inputs, tmp_path / "out.safetensors", ExtractSettings(rank=1))

    assert {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    }


def test_models_that_do_not_belong_together_are_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.manual_seed(0)
    save_file(sdxl_like(), tmp_path / "sdxl.safetensors")
    cases: list[tuple[Path, str]] = [
        (tiny_sd1, "nothing to extract"),
        (make_tiny_sd1(tmp_path / "deep", layers_per_block=2), "lacks .* layers"),
        (edited(tiny_sd1, tmp_path / "narrow", UNET, lambda t: t.update({key: t[key][:8].clone()})), r"\(8, 16\), in"),
        (edited(tiny_sd1, tmp_path / "nan", UNET, lambda t: t[key].fill_(torch.nan)), "is not finite"),
        (edited(tiny_sd1, tmp_path / "bias", UNET, lambda t: t["conv_in.bias"].add_(1)), "differences in 1 biases"),
        (tmp_path / "sdxl.safetensors", "is SDXL, .* is SD 1.x"),
    ]
    for tuned, message in cases:
        with pytest.raises(UserError, match=message):
            extract_adapter(tiny_sd1, tuned, tmp_path / "out.safetensors", ExtractSettings(rank=4))
        assert not (tmp_path / "out.safetensors").exists()
    for settings, message in (
        (ExtractSettings(0), "--rank 0"),
        (ExtractSettings(2, conv_rank=0), "--conv-rank 0"),
        (ExtractSettings(2, energy=2.0), "--energy 2"),
    ):
        with pytest.raises(UserError, match=message):
            extract_adapter(tiny_sd1, tiny_sd1, tmp_path / "out.safetensors", settings)


def test_two_precisions_are_noted(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    half = converted(baked, tmp_path / "half", torch.float16)
    report = extract_adapter(tiny_sd1, half, tmp_path / "out.safetensors", ExtractSettings(rank=4))

    assert any("stored as F32, the tuned model as F16" in note for note in report.notes)


def test_the_command_extracts_and_tells_what_was_kept(tiny_sd1: Path, baked: Path, tmp_path: Path) -> None:
    tuned = edited(baked, tmp_path / "tuned", UNET, lambda tensors: tensors["conv_in.bias"].add_(1))
    out = tmp_path / "out.safetensors"
    arguments = ["extract", "--base", str(tiny_sd1), "--tuned", str(tuned), "--rank", "3", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    for text in ("text_encoder", "least well kept", "Differences that no adapter holds", "biases", "as float32"):
        assert text in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--overwrite" in again.output
