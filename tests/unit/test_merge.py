"""`merge` against dense sums in float64: every method, kind and spelling, and every reason to refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lora_diffusion.adapters.dora import DoRA
from lora_diffusion.cli import app
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.models.load import load_model
from lora_diffusion.streams import stream
from lora_diffusion.tools import low_rank
from lora_diffusion.tools.bake import bake_adapters
from lora_diffusion.tools.block_weights import parse_block_weight
from lora_diffusion.tools.merge import MergeReport, MergeSettings, merge_adapters
from tests.hand_made import dense, locon, loha, lokr, lora, randn, relative, save_kohya
from tests.random_adapters import random_adapter, written

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
TO_Q, TO_K, FF = f"{BLOCK}attn1_to_q", f"{BLOCK}attn2_to_k", f"{BLOCK}ff_net_0_proj"
UP_TO_Q = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV, PROJ_IN = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
TINY_TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
SD1 = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
FLOAT32 = 1e-6
"""Relative: what two roundings of the factors to float32 leave."""


def merged(adapters: list[tuple[Path, float]], out: Path, **settings: object) -> tuple[AdapterFile, MergeReport]:
    report = merge_adapters(adapters, out, MergeSettings(**settings))  # pyright: ignore[reportArgumentType]
    return AdapterFile.read(out), report


def three(folder: Path) -> list[Path]:
    """Ranks 4, 8 and 16 of alphas 4, 1 and 32 on the same layers."""
    return [
        save_kohya(
            folder / f"{name}.safetensors",
            {
                TO_Q: lora(40, 36, rank, alpha=alpha, seed=rank),
                CONV: lora(30, 8, rank, alpha=alpha, seed=rank + 50, kernel=(3, 3)),
                TEXT: lora(64, 32, rank, alpha=alpha, seed=rank + 70),
            },
            SD1,
        )
        for name, rank, alpha in (("a", 4, 4.0), ("b", 8, 1.0), ("c", 16, 32.0))
    ]


def weighted_sum(paths: list[Path], weights: list[float], name: str) -> Tensor:
    total = torch.zeros(1, 1, dtype=torch.float64)
    for path, weight in zip(paths, weights, strict=True):
        total = total + weight * dense(AdapterFile.read(path).modules[name])
    return total


def one(folder: Path, name: str = "one", size: tuple[int, int] = (12, 10), **metadata: str) -> Path:
    modules = {TO_Q: lora(*size, 2, alpha=2, seed=3)}
    return save_kohya(folder / f"{name}.safetensors", modules, metadata or None)


def test_concat_is_the_weighted_sum_for_ranks_and_alphas_of_any_size(tmp_path: Path) -> None:
    paths, weights = three(tmp_path), [1.0, 0.5, -0.3]
    file, report = merged(list(zip(paths, weights, strict=True)), tmp_path / "out.safetensors")

    assert file.modules.keys() == {TO_Q, CONV, TEXT}
    for name in file.modules:
        assert relative(dense(file.modules[name]), weighted_sum(paths, weights, name)) < FLOAT32
        assert file.geometries[name].rank == 28 == file.modules[name]["alpha"].item()
    assert file.modules[CONV]["lora_down.weight"].shape == (28, 8, 3, 3)
    assert file.modules[CONV]["lora_up.weight"].shape == (30, 28, 1, 1)
    assert {module.error for module in report.modules} == {0.0}


def test_concat_stays_exact_where_the_ranks_exceed_the_layer(tmp_path: Path) -> None:
    paths = [
        save_kohya(tmp_path / f"{seed}.safetensors", {TO_Q: lora(9, 12, 6, alpha=3, seed=seed)}) for seed in (10, 20)
    ]
    file, _ = merged([(paths[0], 2.0), (paths[1], -1.0)], tmp_path / "out.safetensors")

    assert file.geometries[TO_Q].rank == 9
    assert relative(dense(file.modules[TO_Q]), weighted_sum(paths, [2.0, -1.0], TO_Q)) < FLOAT32


def test_both_factors_of_the_result_are_of_like_size(tmp_path: Path) -> None:
    module = lora(20, 20, 4, alpha=4, seed=1)
    module["lora_up.weight"] *= 1e-4
    path = save_kohya(tmp_path / "a.safetensors", {TO_Q: module})
    file, _ = merged([(path, -0.5)], tmp_path / "out.safetensors")

    down, up = file.modules[TO_Q]["lora_down.weight"], file.modules[TO_Q]["lora_up.weight"]
    assert float(down.norm() / up.norm()) == pytest.approx(1, rel=1e-5)


def test_kinds_mix_exactly(tmp_path: Path) -> None:
    kinds = {
        "lora": {TO_Q: lora(24, 20, 3, alpha=1, seed=1), FF: lora(24, 20, 2, alpha=2, seed=5)},
        "loha": {TO_Q: loha(24, 20, 3, alpha=2, seed=11), CONV: loha(12, 8 * 9, 2, alpha=1, seed=41)},
        "lokr": {TO_Q: lokr(4, 4, 24, 20, 2, alpha=1, seed=21), FF: lokr(4, 5, 24, 20, None, alpha=7, seed=31)},
        "locon": {CONV: locon(12, 8, 4, alpha=2, seed=51)},
    }
    paths = [save_kohya(tmp_path / f"{kind}.safetensors", modules) for kind, modules in kinds.items()]
    weights = [1.0, -0.5, 2.0, 0.7]
    file, _ = merged(list(zip(paths, weights, strict=True)), tmp_path / "out.safetensors")

    for name in (TO_Q, FF, CONV):
        having = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if name in kinds[kind]]
        expected = sum(weight * dense(kinds[kind][name]) for kind, weight in having)
        assert isinstance(expected, Tensor)
        assert relative(dense(file.modules[name]), expected) < FLOAT32
    assert file.geometries[TO_Q].rank == 3 + 9 + min(4 * 2, 20)
    assert file.modules[CONV]["lora_down.weight"].shape[1:] == (8, 3, 3), "the kernel that a LoHa flattens"
    assert file.kinds == {"lora": 3}


def test_diffusers_reads_a_result_of_several_ranks(tmp_path: Path, tiny_sd1: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    model = load_model(tiny_sd1)
    whole = written(random_adapter(model, seed=1, parts=("unet", "text_encoder")), tmp_path / "whole.safetensors")
    other = random_adapter(model, seed=2, parts=("unet", "text_encoder"), targets="full", rank=6)
    every_other = AdapterFile(dict(list(other.modules.items())[::2]))
    written(every_other, tmp_path / "parts.safetensors")
    inputs = [(tmp_path / "whole.safetensors", 0.7), (tmp_path / "parts.safetensors", -0.4)]
    file, _ = merged(inputs, tmp_path / "out.safetensors")
    bake_adapters(tiny_sd1, inputs, tmp_path / "baked")

    assert {geometry.rank for geometry in file.geometries.values()} >= {4, 6, 10}
    assert file.modules.keys() == whole.modules.keys() | every_other.modules.keys()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, local_files_only=True)
    pipe.load_lora_weights(tmp_path / "out.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for part, weights in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        fused = {name.removeprefix("text_model."): weight for name, weight in getattr(pipe, part).state_dict().items()}
        for name, weight in load_file(tmp_path / "baked" / part / f"{weights}.safetensors").items():
            torch.testing.assert_close(fused[name.removeprefix("text_model.")], weight, rtol=1e-6, atol=1e-6)


def test_a_module_that_one_adapter_has_is_taken_as_it_is(tmp_path: Path) -> None:
    first, second = lora(24, 20, 3, alpha=1, seed=1), lora(24, 20, 5, alpha=2, seed=5)
    paths = [
        save_kohya(tmp_path / "a.safetensors", {TO_Q: first}),
        save_kohya(tmp_path / "b.safetensors", {FF: second}),
    ]
    file, _ = merged([(paths[0], 0.5), (paths[1], 1.0)], tmp_path / "out.safetensors")

    assert {name: geometry.rank for name, geometry in file.geometries.items()} == {TO_Q: 3, FF: 5}
    assert relative(dense(file.modules[TO_Q]), 0.5 * dense(first)) < FLOAT32
    assert relative(dense(file.modules[FF]), dense(second)) < FLOAT32


def test_all_modules_of_a_component_get_one_alpha(tmp_path: Path) -> None:
    other = TEXT.replace("fc1", "fc2")
    first = {TEXT: lora(64, 32, 4, alpha=1, seed=1)}
    second = {TEXT: lora(64, 32, 4, alpha=2, seed=5), other: lora(32, 64, 4, alpha=2, seed=9)}
    paths = [save_kohya(tmp_path / "a.safetensors", first), save_kohya(tmp_path / "b.safetensors", second)]
    file, _ = merged([(path, 1.0) for path in paths], tmp_path / "out.safetensors")

    assert [file.modules[name]["alpha"].item() for name in (TEXT, other)] == [8, 8]
    assert file.geometries[other].rank == 4
    assert relative(dense(file.modules[other]), dense(second[other])) < FLOAT32


@pytest.mark.parametrize("name", [TO_Q, CONV, TEXT])
def test_svd_is_as_good_as_any_matrix_of_the_rank(tmp_path: Path, name: str) -> None:
    paths, weights = three(tmp_path), [1.0, 0.5, -0.3]
    inputs = list(zip(paths, weights, strict=True))
    file, report = merged(inputs, tmp_path / "out.safetensors", method="svd", rank=6)

    expected = weighted_sum(paths, weights, name)
    singular = torch.linalg.svdvals(expected)
    optimum = float(singular[6:].norm() / singular.norm())
    assert file.geometries[name].rank == 6
    assert relative(dense(file.modules[name]), expected) == pytest.approx(optimum, rel=0.01)
    assert next(module.error for module in report.modules if module.name == name) == pytest.approx(optimum, rel=1e-4)


def test_svd_by_energy_takes_the_smallest_rank_that_holds_it(tmp_path: Path) -> None:
    paths = three(tmp_path)
    file, report = merged([(path, 1.0) for path in paths], tmp_path / "out.safetensors", method="svd", energy=0.9)

    for module in report.modules:
        squares = torch.linalg.svdvals(weighted_sum(paths, [1.0, 1.0, 1.0], module.name)).square()
        held = squares.cumsum(0) / squares.sum()
        assert module.rank == file.geometries[module.name].rank == int((held < 0.9).sum()) + 1
        assert module.error**2 <= 0.1
    assert report.rank is None


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_are_the_dense_methods_truncated(tmp_path: Path, method: str) -> None:
    paths, weights = three(tmp_path), [1.0, 0.5, -0.3]
    inputs = list(zip(paths, weights, strict=True))
    file, report = merged(inputs, tmp_path / "out.safetensors", method=method, density=0.4, seed=7)

    assert report.rank == 16 and report.is_rank_chosen
    for name in file.modules:
        deltas = [dense(AdapterFile.read(path).modules[name]).float() for path in paths]
        if method == "ties":
            expected = low_rank.ties(deltas, weights, 0.4)
        else:
            expected = low_rank.dare(deltas, weights, 0.4, stream(7, "dare", name))
        u, s, vh = torch.linalg.svd(expected.double(), full_matrices=False)
        best = (u[:, :16] * s[:16]) @ vh[:16]
        assert relative(dense(file.modules[name]), best) < 1e-5  # entries near ties' and dare's thresholds are float32
        error = next(module.error for module in report.modules if module.name == name)
        assert error == pytest.approx(float(s[16:].norm() / s.norm()), rel=1e-3)


def test_dare_depends_on_its_seed_alone(tmp_path: Path) -> None:
    inputs = [(path, 1.0) for path in three(tmp_path)]
    first, again, other = (
        merged(inputs, tmp_path / f"{i}.safetensors", method="dare", seed=seed)[0].modules[TO_Q]["lora_up.weight"]
        for i, seed in enumerate((1, 1, 2))
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_block_weights_multiply_for_all_adapters_or_one(tmp_path: Path) -> None:
    modules = [{TO_Q: lora(9, 8, 2, alpha=1, seed=s), UP_TO_Q: lora(9, 8, 2, alpha=1, seed=s + 5)} for s in (1, 50)]
    paths = [save_kohya(tmp_path / f"{i}.safetensors", m) for i, m in enumerate(modules)]
    weights = [parse_block_weight(text) for text in (r"unet.up_blocks.1=0.5", r"2:attn1=-2", r"1:^unet\.down=0")]
    file, _ = merged([(paths[0], 1.0), (paths[1], 0.3)], tmp_path / "out.safetensors", block_weights=weights)

    assert relative(dense(file.modules[TO_Q]), -0.6 * dense(modules[1][TO_Q])) < FLOAT32
    expected = 0.5 * dense(modules[0][UP_TO_Q]) - 0.3 * dense(modules[1][UP_TO_Q])
    assert relative(dense(file.modules[UP_TO_Q]), expected) < FLOAT32
    assert file.geometries[TO_Q].rank == 2, "what has the factor 0 takes no room"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet.up_blocks", "not PATTERN=FACTOR"),
        ("attn1=much", "is not a number"),
        ("attn1=nan", "is not a number"),
        ("(=1", "no regular expression"),
        ("unet.up_blocks.3=1", "no module's name matches"),
        ("3:attn1=1", "there is no adapter 3"),
        ("=1", "not PATTERN=FACTOR"),
        ("attn1=0", "nothing is left to merge"),
    ],
)
def test_a_block_weight_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = one(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        merged([(path, 1.0), (path, 1.0)], tmp_path / "out.safetensors", block_weights=[parse_block_weight(text)])


def test_sdxl_files_of_both_spellings_merge_with_a_peft_one(tmp_path: Path) -> None:
    ldm, own = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "down_blocks.1.attentions.0."
    own += "transformer_blocks.0.attn2.to_k"
    canonical, text = f"lora_unet_{own.replace('.', '_')}", "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    first, second, third = (lora(16, 2048, 2, alpha=1, seed=s) for s in (1, 5, 9))
    text_module = lora(12, 12, 2, alpha=2, seed=13)
    save_kohya(tmp_path / "ldm.safetensors", {ldm: first, text: text_module})
    save_kohya(tmp_path / "own.safetensors", {canonical: second})
    peft = {f"unet.{own}.lora_{x}.weight": third[f"lora_{y}.weight"] for x, y in (("A", "down"), ("B", "up"))}
    save_file(peft, tmp_path / "peft.safetensors")
    inputs = [(tmp_path / f"{name}.safetensors", 1.0) for name in ("ldm", "own", "peft")]
    file, _ = merged(inputs, tmp_path / "out.safetensors")

    assert file.family == "sdxl" and file.modules.keys() == {canonical, text}
    expected = dense(first) + dense(second) + dense(third | {"alpha": torch.tensor(2.0)})
    assert relative(dense(file.modules[canonical]), expected) < FLOAT32
    assert (tmp_path / "out.safetensors").read_bytes().count(ldm.encode()) == 3, "written as sd-scripts spells it"

    as_peft, _ = merged(inputs, tmp_path / "out-peft.safetensors", format="peft")
    assert as_peft.format == "peft"
    assert relative(dense(as_peft.modules[canonical]), expected) < FLOAT32


def test_the_two_names_of_the_one_text_encoder_are_one(tmp_path: Path) -> None:
    first, second = lora(64, 32, 2, alpha=1, seed=1), lora(64, 32, 2, alpha=1, seed=5)
    paths = [
        save_kohya(tmp_path / "a.safetensors", {TEXT: first}, SD1),
        save_kohya(tmp_path / "b.safetensors", {TEXT.replace("lora_te_", "lora_te1_"): second}, SD1),
    ]
    file, _ = merged([(path, 1.0) for path in paths], tmp_path / "out.safetensors")

    assert relative(dense(file.modules[TEXT]), dense(first) + dense(second)) < FLOAT32


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("metadata", [SD1, {}])
def test_a_text_encoder_without_text_model_in_its_names_is_the_same_one(
    tmp_path: Path, format: str, metadata: dict[str, str]
) -> None:
    first, second = lora(64, 32, 2, alpha=1, seed=1), lora(64, 32, 2, alpha=1, seed=5)
    flat = TEXT.replace("text_model_", "")
    paths = [
        save_kohya(tmp_path / "a.safetensors", {TEXT: first}, metadata),
        save_kohya(tmp_path / "b.safetensors", {flat: second}, metadata),
    ]
    file, _ = merged([(path, 1.0) for path in paths], tmp_path / "out.safetensors", format=format)
    alone, _ = merged([(paths[1], 1.0)], tmp_path / "alone.safetensors", format=format)

    assert file.modules.keys() == alone.modules.keys() == {TEXT}
    assert relative(dense(file.modules[TEXT]), dense(first) + dense(second)) < FLOAT32
    assert relative(dense(alone.modules[TEXT]), dense(second)) < FLOAT32


def test_the_first_text_encoder_keeps_its_number_where_no_family_is_known(tmp_path: Path) -> None:
    numbered = TEXT.replace("lora_te_", "lora_te1_")
    path = save_kohya(tmp_path / "a.safetensors", {numbered: lora(64, 32, 2, alpha=1, seed=1)})
    plain = save_kohya(tmp_path / "b.safetensors", {TEXT: lora(64, 32, 2, alpha=1, seed=5)})

    assert merged([(path, 1.0)], tmp_path / "one.safetensors")[0].modules.keys() == {numbered}
    assert merged([(path, 1.0), (plain, 1.0)], tmp_path / "both.safetensors")[0].modules.keys() == {TEXT}


def test_projections_are_convolutions_for_sd1_and_linear_for_sdxl(tmp_path: Path) -> None:
    for version, ndim in (("sd_v1", 4), ("sdxl_base_v1-0", 2)):
        path = save_kohya(
            tmp_path / f"{version}.safetensors",
            {PROJ_IN: loha(8, 8, 2, alpha=1, seed=1)},
            {"ss_base_model_version": version},
        )
        file, _ = merged([(path, 1.0)], tmp_path / f"out-{version}.safetensors")
        assert file.modules[PROJ_IN]["lora_down.weight"].ndim == ndim


def test_matrices_stay_matrices_where_no_family_is_known(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_proj_in"
    path = save_kohya(tmp_path / "a.safetensors", {name: lora(8, 8, 2, alpha=1, seed=1)})
    file, _ = merged([(path, 1.0)], tmp_path / "out.safetensors")

    assert {parts["lora_down.weight"].ndim for parts in file.modules.values()} == {2}


def dora(folder: Path, base: Path) -> tuple[Path, Tensor]:
    """A DoRA of one layer of a tiny base, and its ΔW there."""
    weight = BaseWeights.open(base).read(TINY_TO_Q)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = torch.nn.Parameter(weight)
    adapter = DoRA(layer, 2, 2.0)
    with torch.no_grad():
        adapter.direction.get_parameter("lora_up.weight").copy_(0.3 * randn(weight.shape[0], 2, seed=1))
        adapter.dora_scale.mul_(1.2)
    path = save_kohya(folder / "dora.safetensors", {TINY_TO_Q: adapter.tensors()}, SD1)
    return path, adapter.delta().detach()


def test_auto_precision_is_that_of_a_doras_factors_and_not_of_its_magnitudes(tmp_path: Path, tiny_sd1: Path) -> None:
    path, _ = dora(tmp_path, tiny_sd1)
    AdapterFile.read(path).write(tmp_path / "half.safetensors", dtype=torch.float16)
    assert AdapterFile.read(tmp_path / "half.safetensors").modules[TINY_TO_Q]["dora_scale"].dtype == torch.float32
    for name, precision in (("half", torch.float16), ("dora", torch.float32)):
        inputs = [(tmp_path / f"{name}.safetensors", 1.0)]
        _, report = merged(inputs, tmp_path / f"{name}_out.safetensors", method="svd", rank=2, base=tiny_sd1)
        assert report.precision == precision


def test_a_dora_merges_by_svd_with_the_change_it_makes_in_its_base(tmp_path: Path, tiny_sd1: Path) -> None:
    path, delta = dora(tmp_path, tiny_sd1)
    plain = {TINY_TO_Q: lora(*delta.shape, 2, alpha=1, seed=4)}
    other = save_kohya(tmp_path / "plain.safetensors", plain, SD1)
    inputs = [(path, 0.5), (other, -1.0)]
    file, _ = merged(inputs, tmp_path / "out.safetensors", method="svd", rank=99, base=tiny_sd1)

    expected = 0.5 * delta.double() - dense(plain[TINY_TO_Q])
    assert relative(dense(file.modules[TINY_TO_Q]), expected) < FLOAT32
    for settings, message in (({"method": "svd"}, "with --base"), ({"base": tiny_sd1}, "Use --method svd")):
        with pytest.raises(UserError, match=message):
            merged(inputs, tmp_path / "no.safetensors", **settings)


def test_the_metadata_says_what_was_merged_and_claims_no_training(tmp_path: Path) -> None:
    common = SD1 | {"ss_sd_model_name": "v1-5", "modelspec.resolution": "512x512", "ss_steps": "400", "ss_unet_lr": "1"}
    paths = [
        one(tmp_path, "neon", **common, **{"modelspec.trigger_phrase": "neon style"}),
        one(tmp_path, "ink", **common | {"modelspec.resolution": "768x768", "modelspec.trigger_phrase": "ink style"}),
    ]
    weight = parse_block_weight("2:attn1=0.5")
    file, _ = merged([(paths[0], 0.7), (paths[1], 0.5)], tmp_path / "both.safetensors", block_weights=[weight])

    metadata = file.metadata
    assert metadata["modelspec.merged_from"] == "neon, ink"
    assert metadata["modelspec.trigger_phrase"] == "neon style, ink style"
    assert metadata["ss_sd_model_name"] == "v1-5" and metadata["modelspec.title"] == "both"
    assert "modelspec.resolution" not in metadata, "the two do not agree"
    assert not {"ss_steps", "ss_unet_lr"} & metadata.keys()
    assert json.loads(metadata["lora_diffusion.made_by"]) == {
        "command": "merge",
        "method": "concat",
        "adapters": [{"name": "neon", "weight": 0.7}, {"name": "ink", "weight": 0.5}],
        "block_weights": ["2:attn1=0.5"],
    }


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float16),
        ((torch.float16, torch.float32), torch.float32),
    ],
)
def test_the_precision_is_the_finest_of_the_inputs(
    tmp_path: Path, dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    inputs: list[tuple[Path, float]] = []
    for i, dtype in enumerate(dtypes):
        module = {part: tensor.to(dtype) for part, tensor in lora(12, 10, 2, alpha=2, seed=i).items()}
        inputs.append((save_kohya(tmp_path / f"{i}.safetensors", {TO_Q: module}), 1.0))
    file, report = merged(inputs, tmp_path / "out.safetensors")

    assert file.modules[TO_Q]["lora_up.weight"].dtype == expected == report.precision
    assert (report.modules[0].rounding > 0) == (expected != torch.float32)
    exact = sum((dense(AdapterFile.read(path).modules[TO_Q]) for path, _ in inputs), torch.zeros(1, 1))
    assert relative(dense(file.modules[TO_Q]), exact) == pytest.approx(report.modules[0].rounding, rel=0.05, abs=1e-6)


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite as float16"):
        merged([(one(tmp_path), 1e12)], tmp_path / "out.safetensors", precision="fp16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "add"}, "there are concat, svd, ties, dare"),
        ({"rank": 4}, "Use --method svd"),
        ({"energy": 0.5}, "Use --method svd"),
        ({"method": "svd", "rank": 0}, "1 or more"),
        ({"method": "svd", "rank": 2, "energy": 0.5}, "Give one of them"),
        ({"method": "svd", "energy": 1.5}, "at most 1"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "svd", "density": 0.5}, "with --method ties or dare"),
        ({"precision": "int8"}, "fp16, bf16, fp32"),
        ({"format": "onnx"}, "kohya"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged([(one(tmp_path), 1.0)], tmp_path / "out.safetensors", **settings)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_merges_nothing_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(UserError, match="merges nothing"):
        merged([(one(tmp_path), weight)], tmp_path / "out.safetensors")


def test_adapters_of_two_families_or_sizes_are_refused(tmp_path: Path) -> None:
    first = one(tmp_path, "sd1", ss_base_model_version="sd_v1")
    for other, message in (
        (one(tmp_path, "sdxl", ss_base_model_version="sdxl_base_v1-0"), "made for SDXL, .*sd1.safetensors for SD 1"),
        (one(tmp_path, "wide", size=(12, 14)), "12 x 14, in .*sd1.safetensors it is 12 x 10"),
    ):
        with pytest.raises(UserError, match=message):
            merged([(first, 1.0), (other, 1.0)], tmp_path / "out.safetensors")


def test_an_input_is_never_overwritten_and_another_file_only_when_told(tmp_path: Path) -> None:
    path, out = one(tmp_path), tmp_path / "out.safetensors"
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    out.write_bytes(b"precious")
    for target, overwrite, message in (
        (path, True, "this is the input"),
        (tmp_path / "link.safetensors", True, "this is the input"),
        (out, False, "of this name already"),
        (tmp_path / "out.ckpt", False, r"should end in .safetensors"),
        (tmp_path / "none" / "out.safetensors", False, "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            merge_adapters([(path, 1.0)], target, MergeSettings(), overwrite=overwrite)
    assert path.read_bytes() == before and out.read_bytes() == b"precious"

    merge_adapters([(path, 1.0)], out, MergeSettings(), overwrite=True)
    assert AdapterFile.read(out).modules.keys() == {TO_Q}


def test_the_command_merges_and_tells_what_it_did(tmp_path: Path) -> None:
    paths, out = three(tmp_path), tmp_path / "out.safetensors"
    arguments = ["merge", f"{paths[0]}:0.7", f"{paths[1]}:-0.3", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--method", "svd", "--block-weight", "1:resnets=0.5"])

    assert done.exit_code == 0, done.output
    assert "shortened to rank 8, the largest of the inputs" in done.output
    assert "-0.3 ×" in done.output and "2 in unet, 1 in text_encoder" in done.output
    expected = 0.35 * dense(AdapterFile.read(paths[0]).modules[CONV]) - 0.3 * dense(
        AdapterFile.read(paths[1]).modules[CONV]
    )
    singular = torch.linalg.svdvals(expected)
    found = relative(dense(AdapterFile.read(out).modules[CONV]), expected)
    assert found == pytest.approx(float(singular[8:].norm() / singular.norm()), rel=0.01)

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--overwrite" in again.output
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
