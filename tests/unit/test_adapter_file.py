"""Adapter files: what we write is what was in memory, and means the same to diffusers; what others write, we read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from lora_diffusion.adapters.inject import inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.container import with_metadata
from lora_diffusion.errors import RunError
from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.models.load import load_model
from lora_diffusion.models.sd1 import SD1
from tests.random_adapters import random_adapter
from tests.tiny import make_tiny_sd1

BOTH = ("unet", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd1(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder: Path) -> SD1:
    model = load_model(folder)
    assert isinstance(model, SD1)
    return model


@pytest.fixture
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def adapter(model: SD1, targets: str = "full", alpha: float = 3.0) -> AdapterFile:
    """Random weights of rank 4 for UNet and text encoder, at a scale that is not 1."""
    file = random_adapter(model, seed=1, parts=BOTH, targets=targets)
    return AdapterFile({name: {**parts, "alpha": torch.tensor(alpha)} for name, parts in file.modules.items()})


def deltas(file: AdapterFile, model: SD1) -> dict[str, Tensor]:
    """What the file adds to each weight, by kohya name."""
    found = {}
    for match in file.attach(model.parts).matches:
        name = model.parts[match.part].file_name(match.path)
        found[name] = LoRA.from_tensors(match.layer, match.tensors).delta()
    return found


def deltas_in_diffusers(pipeline: StableDiffusionPipeline, model: SD1) -> dict[str, Tensor]:
    found = {}
    for part, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for path, layer in module.named_modules():
            if hasattr(layer, "get_delta_weight"):
                (name,) = layer.lora_A
                delta = layer.get_delta_weight(name).detach()
                found[model.parts[part].file_name(path)] = delta
    return found


def assert_same_deltas(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)  # float32 products


def same_modules(first: AdapterFile, second: AdapterFile) -> bool:
    return first.modules.keys() == second.modules.keys() and all(
        parts.keys() == second.modules[name].keys()
        and all(torch.equal(parts[p], second.modules[name][p]) for p in parts)
        for name, parts in first.modules.items()
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_written_file_reads_back_as_it_was(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    file.write(tmp_path / "a.safetensors", dtype=torch.float32)
    back = AdapterFile.read(tmp_path / "a.safetensors")
    assert same_modules(back, file)
    assert len(back.modules) == 177 + 12
    assert (back.format, back.unread, back.notes) == ("kohya", (), ())


def test_half_precision_rounds_the_weights_once_and_the_alpha_never(model: SD1, tmp_path: Path) -> None:
    file = adapter(model, alpha=1 / 3)
    file.write(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for name, parts in file.modules.items():
        assert torch.equal(tensors[f"{name}.lora_up.weight"], parts["lora_up.weight"].half())
        alpha = tensors[f"{name}.alpha"]
        assert (alpha.shape, alpha.dtype, alpha.item()) == (torch.Size([]), torch.float32, parts["alpha"].item())


def test_live_adapters_are_collected_as_copies(model: SD1) -> None:
    layers = select_layers(model.unet, "attention")
    live = {path: LoRA(layer, 2, 1.0) for path, layer in layers.items()}
    file = AdapterFile.collect(model.parts, {"unet": live})
    path, lora = next(iter(live.items()))
    with torch.no_grad():
        lora.lora_up.weight.fill_(7.0)
    parts = file.modules[model.parts["unet"].file_name(path)]
    assert not parts["lora_up.weight"].any()
    assert parts["alpha"] == 1.0


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_model_hash_is_the_sha256_of_the_bytes_after_the_header(model: SD1, tmp_path: Path, format: Any) -> None:
    path = tmp_path / "a.safetensors"
    adapter(model).write(path, format=format)
    data = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


def test_metadata_is_kept_and_paths_are_not_added(model: SD1, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    AdapterFile(adapter(model).modules, {"ss_output_name": "ink"}).write(path)
    metadata = AdapterFile.read(path).metadata
    described = {f"ss_network_{what}" for what in ("module", "dim", "alpha", "args")}
    assert metadata.keys() == {"format", "ss_output_name", "sshs_model_hash", "sshs_legacy_hash"} | described
    assert metadata["ss_network_module"] == "networks.lora"
    assert str(tmp_path) not in json.dumps(dict(metadata))


def test_the_same_adapter_is_the_same_file(model: SD1, tmp_path: Path) -> None:
    for name in ("a", "b"):
        adapter(model).write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_other_users_may_read_the_file_if_the_umask_lets_them(model: SD1, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        adapter(model).write(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_value_that_does_not_fit_is_an_error_and_the_old_file_stays(model: SD1, tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    adapter(model).write(path)
    before = path.read_bytes()
    damaged = adapter(model)
    name, parts = next(iter(damaged.modules.items()))
    parts["lora_up.weight"][0, 0] = value
    with pytest.raises(RunError, match=rf"{name}.lora_up.weight is not finite as float16.*save as float32"):
        damaged.write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_that_could_not_be_read_is_not_put_in_place_of_another(model: SD1, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the old one")
    foreign = AdapterFile({"layer": next(iter(adapter(model).modules.values()))})
    with pytest.raises(RunError, match=r"a.safetensors: what was written cannot be used and was not kept"):
        foreign.write(path)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_lie_as_the_safetensors_library_lays_them(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = {"lora_down.weight": torch.rand(2, 6), "lora_up.weight": torch.rand(4, 2), "alpha": torch.tensor(1.0)}
    names = [f"lora_unet_mid_block_attentions_{i}_proj_in" for i in (10, 2)]
    AdapterFile(dict.fromkeys(names, parts | {"dora_scale": torch.rand(1, 6)})).write(tmp_path / "a", dtype=dtype)
    theirs, ours = save(load_file(tmp_path / "a")), (tmp_path / "a").read_bytes()
    starts = [8 + int.from_bytes(data[:8], "little") for data in (theirs, ours)]
    assert ours[starts[1] :] == theirs[starts[0] :]
    tables = [json.loads(data[8:start]) for data, start in zip((theirs, ours), starts, strict=True)]
    assert list(tables[0].items()) == [item for item in tables[1].items() if item[0] != "__metadata__"]


def test_legacy_hash_is_of_64_kib_behind_the_first_mib_of_a_file_with_the_kohya_metadata_alone(tmp_path: Path) -> None:
    parts = {"lora_down.weight": torch.rand(64, 5000), "lora_up.weight": torch.rand(6000, 64)}
    modules = {"lora_unet_mid_block_attentions_0_proj_in": parts | {"alpha": torch.tensor(1.0)}}
    AdapterFile(modules, {"ss_output_name": "ink", "modelspec.title": "Ink"}).write(tmp_path / "a")
    data, metadata = (tmp_path / "a").read_bytes(), AdapterFile.read(tmp_path / "a").metadata
    alone = with_metadata(data, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]


def test_writing_needs_no_second_copy_of_the_file(tmp_path: Path) -> None:
    parts = {"lora_down.weight": torch.rand(64, 16384), "lora_up.weight": torch.rand(16384, 64)}
    file = AdapterFile({"lora_unet_mid_block_attentions_0_proj_in": parts | {"alpha": torch.tensor(1.0)}})
    tracemalloc.start()
    try:
        file.write(tmp_path / "a.safetensors", dtype=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size > 8_000_000
    assert peak < 0.7 * size  # of the two tensors one at a time, when it is read back


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(model: SD1, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere/a.safetensors: the adapter cannot be written \(No such file"):
        adapter(model).write(tmp_path / "nowhere" / "a.safetensors")


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_computes_the_same_change_from_our_file(
    model: SD1, pipeline: StableDiffusionPipeline, tmp_path: Path, format: Any
) -> None:
    file = adapter(model)
    file.write(tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs = deltas_in_diffusers(pipeline, model)
    assert len(theirs) == 189
    assert_same_deltas(theirs, deltas(file, model))


def test_peft_format_reads_back_as_the_same_change(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    file.write(tmp_path / "a.safetensors", format="peft", dtype=torch.float32)
    back = AdapterFile.read(tmp_path / "a.safetensors")
    assert back.format == "peft"
    assert_same_deltas(deltas(back, model), deltas(file, model))


ALPHAS = {"unet": {"alpha_pattern": {"attn1.to_v": 5}}, "text_encoder": {}}
RANKS = {"unet": {"rank_pattern": {"attn1.to_q": 2}}, "text_encoder": {"rank_pattern": {"mlp.fc1": 3}}}
ROOTS = {"unet": {"use_rslora": True}, "text_encoder": {"use_rslora": True}}
PLAIN: dict[str, dict[str, Any]] = {"unet": {}, "text_encoder": {}}


@pytest.mark.parametrize(
    ("alpha", "options", "has_metadata"),
    [(3, PLAIN, True), (3, ALPHAS, True), (3, RANKS, True), (3, ROOTS, True), (4, PLAIN, False)],
    ids=["plain", "alpha pattern", "rank pattern", "rsLoRA", "no metadata"],
)
def test_files_that_diffusers_writes_mean_the_same_to_us(
    model: SD1,
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    alpha: int,
    options: dict[str, dict[str, Any]],
    has_metadata: bool,
) -> None:
    """Without metadata a file cannot say its alpha: every reader takes scale 1, so alpha is the rank there."""
    targets = {"unet": ["to_q", "to_v", "conv1", "proj_in"], "text_encoder": ["q_proj", "fc1"]}
    weights, configs = {}, {}
    for part in BOTH:
        module = getattr(pipeline, part)
        config = LoraConfig(
            r=4, lora_alpha=alpha, target_modules=targets[part], init_lora_weights=False, **options[part]
        )
        module.add_adapter(config, "a")
        weights[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="a")
        configs[f"{part}_lora_adapter_metadata"] = module.peft_config["a"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **weights, **(configs if has_metadata else {}))
    file = AdapterFile.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert ("lora_adapter_metadata" in file.metadata) == has_metadata
    assert_same_deltas(deltas(file, model), deltas_in_diffusers(pipeline, model))


# --- reading and attaching -------------------------------------------------------------------------------------------


def save_kohya(file: AdapterFile, path: Path, rename: tuple[str, str] = ("", ""), **extra: Tensor) -> AdapterFile:
    tensors = {f"{n}.{part}".replace(*rename): t for n, parts in file.modules.items() for part, t in parts.items()}
    save_file({**tensors, **extra}, path)
    return AdapterFile.read(path)


def test_a_kohya_file_without_alpha_has_scale_1(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    tensors = {f"{n}.{part}": t for n, parts in file.modules.items() for part, t in parts.items() if part != "alpha"}
    save_file(tensors, tmp_path / "a.safetensors")
    back = AdapterFile.read(tmp_path / "a.safetensors")
    assert {parts["alpha"].item() for parts in back.modules.values()} == {4.0}


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ("to_out.0.lora_A.weight", "to_out.0.lora_B.weight", "to_out.0.alpha"),
        ("to_out.0.lora.down.weight", "to_out.0.lora.up.weight", "to_out.0.alpha"),
        ("processor.to_out_lora.down.weight", "processor.to_out_lora.up.weight", "processor.to_out.alpha"),
    ],
)
def test_an_alpha_tensor_counts_in_files_of_dotted_names(tmp_path: Path, down: str, up: str, alpha: str) -> None:
    attention, silent = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.", "unet.mid_block.attentions.0.proj_in"
    tensors = {attention + down: torch.ones(4, 8), attention + up: torch.ones(8, 4), attention + alpha: torch.ones(())}
    tensors |= {f"{silent}.lora_A.weight": torch.ones(4, 8), f"{silent}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = AdapterFile.read(tmp_path / "a.safetensors")
    assert {name.rpartition("_attentions_0_")[2]: parts["alpha"].item() for name, parts in file.modules.items()} == {
        "transformer_blocks_0_attn1_to_out_0": 1.0,
        "proj_in": 4.0,
    }
    assert file.notes == ()


def test_an_alpha_tensor_counts_more_than_metadata(tmp_path: Path) -> None:
    tensors = {f"unet.mid_block.proj_in.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(tensors | {"unet.mid_block.proj_in.alpha": torch.ones(())}, tmp_path / "a.safetensors", metadata)
    (parts,) = AdapterFile.read(tmp_path / "a.safetensors").modules.values()
    assert parts["alpha"] == 1.0


def test_the_numbered_name_of_the_text_encoder_is_understood(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    back = save_kohya(file, tmp_path / "a.safetensors", rename=("lora_te_", "lora_te1_"))
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in back.modules
    assert_same_deltas(deltas(back, model), deltas(file, model))


def test_names_of_the_text_encoder_without_text_model_are_understood(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    back = save_kohya(file, tmp_path / "a.safetensors", rename=("lora_te_text_model_", "lora_te_"))
    assert "lora_te_encoder_layers_0_mlp_fc1" in back.modules
    assert back.attach(model.parts).unread == ()
    assert_same_deltas(deltas(back, model), deltas(file, model))


def test_a_module_under_both_text_encoder_names_is_refused(model: SD1, tmp_path: Path) -> None:
    file = adapter(model)
    twice = {n.replace("lora_te_", "lora_te1_"): parts for n, parts in file.modules.items() if n.startswith("lora_te_")}
    with pytest.raises(AdapterFileError, match="two names"):
        AdapterFile({**file.modules, **twice}).attach(model.parts)


def test_tensors_of_no_module_are_reported(model: SD1, tmp_path: Path) -> None:
    back = save_kohya(adapter(model), tmp_path / "a.safetensors", step=torch.tensor(3))
    assert back.unread == ("step",)
    assert back.notes == ("1 tensors were not read: step",)


def test_modules_that_the_base_lacks_are_reported(model: SD1) -> None:
    file = adapter(model)
    other = "lora_unet_down_blocks_9_attentions_0_proj_in"
    found = AdapterFile({**file.modules, other: next(iter(file.modules.values()))}).attach(model.parts)
    assert found.unread == (other,)
    assert len(found.matches) == len(file.modules)


def test_odd_but_usable_files_are_read_with_a_note(model: SD1, tmp_path: Path) -> None:
    file = adapter(model, alpha=0.0)
    for parts in file.modules.values():
        parts["lora_up.weight"].zero_()
    path = tmp_path / "a.safetensors"
    tensors = {f"{name}.{part}": tensor for name, parts in file.modules.items() for part, tensor in parts.items()}
    save_file(tensors, path, {"ss_network_dim": "99"})
    notes = AdapterFile.read(path).notes
    assert len(notes) == 3
    assert notes[0] == "alpha is 0 in 189 of 189 modules: they change nothing"
    assert notes[1] == "the weights are all 0 in 189 of 189 modules: they change nothing"
    assert notes[2] == "the metadata says rank 99, the tensors have 4"


def test_matrices_stand_for_1x1_convolutions(model: SD1) -> None:
    file = adapter(model, targets="attention-mlp")
    flat = {n: {part: t.flatten(1) if t.ndim == 4 else t for part, t in m.items()} for n, m in file.modules.items()}
    assert any(t.ndim == 4 for parts in file.modules.values() for t in parts.values())
    assert_same_deltas(deltas(AdapterFile(flat), model), deltas(file, model))


def test_a_model_that_is_being_trained_takes_the_file_too(folder: Path, model: SD1) -> None:
    adapted = load_model(folder)
    layers = select_layers(adapted.parts["unet"].module, "attention")
    inject(adapted.parts["unet"].module, layers, lambda _, layer: LoRA(layer, 2, 2.0))
    file = adapter(model)
    found = file.attach(adapted.parts)
    assert {m.path for m in found.matches} == {m.path for m in file.attach(model.parts).matches}
    assert all(isinstance(match.layer, nn.Linear | nn.Conv2d) for match in found.matches)


def test_metadata_of_any_size_and_content_is_only_text(model: SD1, tmp_path: Path) -> None:
    evil = {"ss_training_comment": "os.system", "ss_tag_frequency": "[" * 200_000, "<script>": "x" * 2_000_000}
    path = tmp_path / "a.safetensors"
    AdapterFile(adapter(model).modules, evil).write(path)
    back = AdapterFile.read(path)
    assert {key: back.metadata[key] for key in evil} == evil
    assert same_modules(back, AdapterFile.read(path))
