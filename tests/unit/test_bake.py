"""`bake`: a copy of a base that draws what base and adapters draw, and an account of what its precision loses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.load import load_model
from lora_diffusion.tools.bake import bake_adapters
from tests.hand_made import dense, loha, lokr, lora, randn, relative, save_kohya
from tests.random_adapters import random_adapter, written
from tests.single_file import make_single_file
from tests.unit.test_checkpoint_file import converted, raw, sdxl_like

STEM = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
TO_Q, TO_K, FF = f"{STEM}attn1_to_q", f"{STEM}attn1_to_k", f"{STEM}ff_net_0_proj"
CONV = "lora_unet_down_blocks_1_resnets_0_conv2"
FLOAT32 = 1e-6


@pytest.fixture(scope="module")
def adapters(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two LoRAs of every layer, one of them with the text encoder, and their strengths."""
    model, folder = load_model(tiny_sd1), tmp_path_factory.mktemp("adapters")
    written(random_adapter(model, seed=1, parts=("unet", "text_encoder")), folder / "neon.safetensors")
    written(random_adapter(model, seed=2, targets="full"), folder / "ink.safetensors")
    return [(folder / "neon.safetensors", 0.7), (folder / "ink.safetensors", -0.5)]


def size_of(base: Path, name: str) -> tuple[int, int]:
    shape = BaseWeights.open(base).layers[name].shape
    return shape[0], int(np.prod(shape[1:]))


def change_in(base: Path, out: Path, name: str) -> Tensor:
    return (BaseWeights.open(out).read(name).double() - BaseWeights.open(base).read(name).double()).flatten(1)


def test_a_baked_folder_draws_what_base_and_adapters_draw(
    tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    report = bake_adapters(tiny_sd1, adapters, tmp_path / "baked")
    engine = Engine(load_model(tiny_sd1))
    for path, _ in adapters:
        engine.load_adapter(path.stem, AdapterFile.read(path))
    request = Request("a red cat", "blurry", seed=1, steps=3, cfg=5.0, size=(32, 32))
    strengths = {path.stem: strength for path, strength in adapters}
    (plain, live) = engine.generate([request, Request(**{**vars(request), "adapters": strengths})])
    (baked,) = Engine(load_model(tmp_path / "baked")).generate([request])

    difference = np.abs(np.asarray(baked).astype(int) - np.asarray(live).astype(int))
    assert difference.max() <= 2, "sums of matrix products round differently from products of sums"
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(live).astype(int)).mean() > 5
    assert {layer.name for layer in report.layers} == {
        name for path, _ in adapters for name in AdapterFile.read(path).modules
    }
    assert report.rounding < FLOAT32


def test_diffusers_fuses_the_same_weights(tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    path, strength = adapters[0]
    bake_adapters(tiny_sd1, [(path, strength)], tmp_path / "baked")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, local_files_only=True)
    pipe.load_lora_weights(path)
    pipe.fuse_lora(lora_scale=strength)
    pipe.unload_lora_weights()

    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        fused = {name.removeprefix("text_model."): weight for name, weight in getattr(pipe, part).state_dict().items()}
        baked = load_file(tmp_path / "baked" / part / f"{file}.safetensors")
        assert len(baked) > 30
        for name, weight in baked.items():
            torch.testing.assert_close(fused[name.removeprefix("text_model.")], weight, rtol=1e-6, atol=1e-6)
    assert all(name.startswith("text_model.") for name in baked), "the names that older readers need"


def test_a_single_file_stays_one_and_says_what_went_into_it(
    tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    source = make_single_file(tiny_sd1, tmp_path / "tiny.safetensors")
    out = tmp_path / "out.safetensors"
    bake_adapters(source, adapters, out)
    bake_adapters(tiny_sd1, adapters, tmp_path / "baked")

    file, folder = BaseWeights.open(out), BaseWeights.open(tmp_path / "baked")
    for name in folder.layers:
        assert torch.equal(file.read(name), folder.read(name))
    metadata = read_header(out).metadata
    assert metadata["modelspec.merged_from"] == "tiny, neon, ink"
    assert json.loads(metadata["lora_diffusion.made_by"])["adapters"][0] == {"name": "neon", "strength": 0.7}
    before, after = raw(source), raw(out)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {file.layers[name].key for path, _ in adapters for name in AdapterFile.read(path).modules}


def test_loha_and_lokr_are_added_exactly(tiny_sd1: Path, tmp_path: Path) -> None:
    (out_q, in_q), (out_c, in_c) = size_of(tiny_sd1, TO_Q), size_of(tiny_sd1, CONV)
    modules = {
        TO_Q: loha(out_q, in_q, 2, alpha=1, seed=1),
        TO_K: lokr(4, 4, out_q, in_q, 2, alpha=1, seed=11),
        CONV: loha(out_c, in_c, 2, alpha=2, seed=21),
    }
    path = save_kohya(tmp_path / "a.safetensors", modules)
    bake_adapters(tiny_sd1, [(path, 0.5)], tmp_path / "out")

    for name, module in modules.items():
        assert relative(change_in(tiny_sd1, tmp_path / "out", name), 0.5 * dense(module)) < 3 * FLOAT32


def test_a_text_encoder_without_text_model_in_its_names_is_baked(tiny_sd1: Path, tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    module = lora(*size_of(tiny_sd1, name), 2, alpha=1, seed=1)
    path = save_kohya(tmp_path / "a.safetensors", {name.replace("text_model_", ""): module})
    report = bake_adapters(tiny_sd1, [(path, 1.0)], tmp_path / "out")

    assert [layer.name for layer in report.layers] == [name]
    assert relative(change_in(tiny_sd1, tmp_path / "out", name), dense(module)) < 3 * FLOAT32


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dora_sees_what_the_adapters_before_it_left(tiny_sd1: Path, tmp_path: Path, axis: int) -> None:
    size, weight = size_of(tiny_sd1, TO_Q), BaseWeights.open(tiny_sd1).read(TO_Q).double()
    plain, inside = lora(*size, 2, alpha=2, seed=1), lora(*size, 2, alpha=1, seed=5)
    scale = randn(*(size[0], 1) if axis == 0 else (1, size[1]), seed=9).abs() + 0.5
    first = save_kohya(tmp_path / "plain.safetensors", {TO_Q: plain})
    second = save_kohya(tmp_path / "dora.safetensors", {TO_Q: inside | {"dora_scale": scale}})

    def with_dora(before: Tensor) -> Tensor:
        moved = before + dense(inside)
        return before + 0.8 * (scale.double() * moved / moved.norm(dim=1 - axis, keepdim=True) - before)

    bake_adapters(tiny_sd1, [(first, 0.6), (second, 0.8)], tmp_path / "after")
    bake_adapters(tiny_sd1, [(second, 0.8), (first, 0.6)], tmp_path / "before")

    expected = with_dora(weight + 0.6 * dense(plain))
    assert relative(BaseWeights.open(tmp_path / "after").read(TO_Q), expected) < FLOAT32
    other = with_dora(weight) + 0.6 * dense(plain)
    assert relative(BaseWeights.open(tmp_path / "before").read(TO_Q), other) < FLOAT32
    assert relative(other, expected) > 0.01


def test_q_and_v_of_a_stacked_text_encoder_change_and_k_does_not(tmp_path: Path) -> None:
    source = tmp_path / "sdxl.safetensors"
    torch.manual_seed(0)
    save_file(sdxl_like(), source)
    stem = "lora_te2_text_model_encoder_layers_0_self_attn_"
    modules = {f"{stem}{x}_proj": lora(6, 6, 2, alpha=2, seed=i) for i, x in enumerate("qv")}
    path = save_kohya(tmp_path / "a.safetensors", modules)
    bake_adapters(source, [(path, 1.0)], tmp_path / "out.safetensors")

    for x in "qv":
        delta = change_in(source, tmp_path / "out.safetensors", f"{stem}{x}_proj")
        assert relative(delta, dense(modules[f"{stem}{x}_proj"])) < 3 * FLOAT32
    assert not change_in(source, tmp_path / "out.safetensors", f"{stem}k_proj").any()


def test_a_text_projection_changes_though_openclip_keeps_it_transposed(tmp_path: Path) -> None:
    source, name = tmp_path / "sdxl.safetensors", "lora_te2_text_projection"
    torch.manual_seed(0)
    save_file(sdxl_like(), source)
    module = lora(5, 6, 2, alpha=1, seed=1)
    path = save_kohya(tmp_path / "a.safetensors", {name: module})
    bake_adapters(source, [(path, 1.0)], tmp_path / "out.safetensors")

    assert relative(change_in(source, tmp_path / "out.safetensors", name), dense(module)) < 3 * FLOAT32
    before, after = raw(source), raw(tmp_path / "out.safetensors")
    assert [key for key in before if before[key] != after[key]] == ["conditioner.embedders.1.model.text_projection"]


def test_the_report_tells_what_bfloat16_loses(
    tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base = converted(tiny_sd1, tmp_path / "bf16", torch.bfloat16)
    path = adapters[0][0]
    report = bake_adapters(base, [(path, 0.1)], tmp_path / "out")

    modules = AdapterFile.read(path).modules
    layer = max(report.layers, key=lambda layer: layer.rounding)
    found = change_in(base, tmp_path / "out", layer.name)
    assert relative(found, 0.1 * dense(modules[layer.name])) == pytest.approx(layer.rounding, rel=1e-3)
    assert 0.01 < report.rounding < layer.rounding
    exact = 0.1 * dense(modules[layer.name]).norm() / BaseWeights.open(base).read(layer.name).norm()
    assert layer.relative_change == pytest.approx(float(exact), rel=1e-4)


def test_what_does_not_fit_is_refused_and_nothing_is_left(
    tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    size = size_of(tiny_sd1, TO_Q)
    module = lora(*size, 2, alpha=1, seed=1)
    foreign = save_kohya(
        tmp_path / "foreign.safetensors", {TO_Q: module, f"{STEM}attn9_to_q": lora(*size, 2, alpha=1, seed=3)}
    )
    wide = save_kohya(tmp_path / "wide.safetensors", {TO_Q: lora(size[0], 99, 2, alpha=1, seed=1)})
    sdxl = save_kohya(tmp_path / "sdxl.safetensors", {TO_Q: module}, {"ss_base_model_version": "sdxl_base_v1-0"})
    for path, strength, message in (
        (foreign, 1.0, "has no layer for 1 of its 2 modules"),
        (wide, 1.0, f"x 99, in .* it is {size[0]} x {size[1]}"),
        (sdxl, 1.0, "made for SDXL; .* is SD 1.x"),
        (adapters[0][0], 0.0, "bakes nothing"),
        (tmp_path / "missing.safetensors", 1.0, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            bake_adapters(tiny_sd1, [(path, strength)], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        bake_adapters(tiny_sd1, adapters, tmp_path / "out")


def test_the_command_bakes_and_warns_of_a_coarse_base(
    tiny_sd1: Path, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    base = converted(tiny_sd1, tmp_path / "bf16", torch.bfloat16)
    arguments = ["bake", "--base", str(base), "--out", str(tmp_path / "out"), "--adapter", f"{adapters[0][0]}:0.05"]
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    assert "in text_encoder" in done.output and "lost by rounding" in done.output
    assert "are coarse for this change" in " ".join(done.output.split())
    assert CliRunner().invoke(app, arguments).exit_code == 2
