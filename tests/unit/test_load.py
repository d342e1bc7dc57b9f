"""Loading a base: what is on disk is what is in memory, and what cannot be trained is refused with the reason."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.container import ContainerError
from lora_diffusion.errors import UserError
from lora_diffusion.models.base import ModelError
from lora_diffusion.models.load import find, load_model
from lora_diffusion.models.packed_conv import has_fast_bf16
from lora_diffusion.models.sd1 import SD1
from tests.tiny import make_tiny_sd1

TEXT_WEIGHTS = Path("text_encoder", "model.safetensors")
UNET_WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
VAE_WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_sd1(tmp_path / "base")


def load(folder: Path, **options: Any) -> SD1:
    model = load_model(folder, **options)
    assert isinstance(model, SD1)
    return model


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): t for name, t in tensors.items() if "position_ids" not in name}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def test_weights_in_memory_are_those_on_disk(folder: Path) -> None:
    model = load(folder)
    assert same(model.unet.state_dict(), load_file(folder / UNET_WEIGHTS))
    assert same(model.vae.state_dict(), load_file(folder / VAE_WEIGHTS))
    assert same(flat(model.text_encoder.state_dict()), flat(load_file(folder / TEXT_WEIGHTS)))


def test_text_encoder_is_loaded_from_a_file_without_the_text_model_level(folder: Path) -> None:
    expected = load(folder).encode_text(["the red cat"]).hidden
    change_weights(folder / TEXT_WEIGHTS, flat)
    assert torch.equal(load(folder).encode_text(["the red cat"]).hidden, expected)


def test_loading_draws_nothing_from_the_global_generator(folder: Path) -> None:
    before = torch.random.get_rng_state()
    load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_model_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    model = load(folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in (model.unet, model.vae, model.text_encoder))


@pytest.mark.parametrize(("is_fast", "vae"), [(False, torch.float32), (True, torch.bfloat16)])
def test_vae_is_bfloat16_with_the_rest_where_the_cpu_computes_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool, vae: torch.dtype
) -> None:
    monkeypatch.setattr("lora_diffusion.models.load.has_fast_bf16", lambda: is_fast)
    model = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {vae}


def test_weights_do_not_follow_the_file_after_loading(folder: Path) -> None:
    model = load(folder)
    before = {name: t.clone() for name, t in model.unet.state_dict().items()}
    size = (folder / UNET_WEIGHTS).stat().st_size
    (folder / UNET_WEIGHTS).write_bytes(bytes(size))
    assert same(model.unet.state_dict(), before)


def test_vae_files_with_the_old_attention_names_are_loaded(folder: Path) -> None:
    expected = load(folder).vae.state_dict()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for new_name, old_name in old.items():
            tensors = {name.replace(new_name, old_name): t for name, t in tensors.items()}
        return tensors

    change_weights(folder / VAE_WEIGHTS, rename)
    assert any(".proj_attn." in name for name in load_file(folder / VAE_WEIGHTS))
    assert same(load(folder).vae.state_dict(), expected)


def split_into_shards(path: Path) -> Path:
    tensors = load_file(path)
    names = [f"{path.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == shard}, path.with_name(shard))
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_sharded_weights_are_loaded_whole(folder: Path) -> None:
    expected = load(folder).unet.state_dict()
    split_into_shards(folder / UNET_WEIGHTS)
    assert same(load(folder).unet.state_dict(), expected)


def test_a_missing_shard_is_named(folder: Path) -> None:
    split_into_shards(folder / UNET_WEIGHTS)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ContainerError, match=r"00002-of-00002.safetensors is missing: one of 2 shards"):
        load(folder)


def test_an_index_cannot_name_files_outside_its_folder(folder: Path) -> None:
    index = split_into_shards(folder / UNET_WEIGHTS)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(ContainerError, match="not a plain file name"):
        load(folder)


def test_half_precision_variant_is_used_when_it_is_the_only_one(folder: Path) -> None:
    half = {name: t.half() for name, t in load_file(folder / UNET_WEIGHTS).items()}
    (folder / UNET_WEIGHTS).unlink()
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(load(folder).unet.conv_in.weight, half["conv_in.weight"].float())


@pytest.fixture
def sharded_halves(folder: Path) -> Path:
    """A base whose UNet and text encoder are shards in half precision, as diffusers and transformers write them."""
    model = load(folder, dtype=torch.float16)
    for part, module, size in (("unet", model.unet, "100KB"), ("text_encoder", model.text_encoder, "20KB")):
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, variant="fp16", max_shard_size=size)
        assert len(list((folder / part).glob("*.fp16-*-of-*.safetensors"))) > 2
    return folder


def test_shards_in_half_precision_are_used_when_they_are_all_there_is(folder: Path, sharded_halves: Path) -> None:
    expected = load(make_tiny_sd1(folder.with_name("whole")))
    found = load(sharded_halves)
    for part in ("unet", "text_encoder"):
        halves = {name: t.half().float() for name, t in getattr(expected, part).state_dict().items()}
        assert same(getattr(found, part).state_dict(), halves)


def test_shards_in_half_precision_under_the_older_name_of_their_index_are_used(sharded_halves: Path) -> None:
    expected = load(sharded_halves).unet.state_dict()
    index = sharded_halves / UNET_WEIGHTS.with_name(f"{UNET_WEIGHTS.name}.index.fp16.json")
    index.rename(index.with_name(f"{UNET_WEIGHTS.name}.fp16.index.json"))
    assert same(load(sharded_halves).unet.state_dict(), expected)


def test_what_is_wrong_with_shards_in_half_precision_is_told_with_the_file(sharded_halves: Path) -> None:
    index = sharded_halves / UNET_WEIGHTS.with_name(f"{UNET_WEIGHTS.name}.index.fp16.json")
    shard = sorted(index.parent.glob("*.fp16-*-of-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ContainerError, match=rf"{shard.name}: the tensors need"):
        load(sharded_halves)
    shard.unlink()
    with pytest.raises(ContainerError, match=rf"{shard.name} is missing: one of \d+ shards"):
        load(sharded_halves)
    index.write_text("{")
    with pytest.raises(ContainerError, match=rf"{index.name}: cannot be read as an index of shards"):
        load(sharded_halves)


def test_of_a_hub_repository_those_parts_are_had_in_half_precision_that_it_has_in_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (folder / UNET_WEIGHTS, folder / VAE_WEIGHTS):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    (folder / UNET_WEIGHTS).unlink()
    fetched = downloaded(folder, tmp_path / "cache", monkeypatch)
    half_unet = UNET_WEIGHTS.with_suffix(".fp16.safetensors")
    assert fetched == {half_unet.as_posix(), VAE_WEIGHTS.as_posix(), TEXT_WEIGHTS.as_posix()}


def test_of_a_hub_repository_shards_in_half_precision_are_had_where_there_are_no_others(
    sharded_halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = downloaded(sharded_halves, tmp_path / "cache", monkeypatch)
    assert fetched == {path.relative_to(sharded_halves).as_posix() for path in sharded_halves.rglob("*.safetensors")}
    assert same(load(tmp_path / "cache").unet.state_dict(), load(sharded_halves).unet.state_dict())


def downloaded(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The weight files that are fetched of a repository with the files of `folder`."""

    def download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        """As `snapshot_download` does, from `folder`."""
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find("somewhere-near/half") == cache
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*.safetensors")}


def test_a_tokenizer_that_does_not_say_its_length_cuts_at_the_encoders(folder: Path) -> None:
    settings = folder / "tokenizer" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    values.pop("model_max_length")
    settings.write_text(json.dumps(values))
    assert load(folder).encode_text(["the " * 500]).hidden.shape == (1, 77, 32)


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such/folder", "somewhere-near/but-not-here", "base.ckpt", "."])
def test_a_base_that_is_not_there_is_an_error_within_five_seconds(path: str) -> None:
    """The suite runs with the hub switched off, as a machine without a network does."""
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"no such folder|not a local path|pickles|no model_index.json"):
        load_model(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "missing", ["unet/config.json", str(UNET_WEIGHTS), str(TEXT_WEIGHTS), "scheduler/scheduler_config.json"]
)
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}.* missing"):
        load(folder)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match=r"tokenizer/vocab.json is missing"):
        load(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickled_weights_are_refused_and_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / UNET_WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(UserError, match=r"pickle.* can run code"):
        load(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("changes", "pipeline", "evidence"),
    [
        (
            {"cross_attention_dim": 1280, "addition_embed_type": "text_time"},
            "StableDiffusionXLImg2ImgPipeline",
            "the SDXL refiner",
        ),
        ({"in_channels": 9}, "StableDiffusionInpaintPipeline", "9 input channels: an inpainting"),
        ({}, "FluxPipeline", "its pipeline is FluxPipeline"),
        ({}, "StableDiffusion3Pipeline", "its pipeline is StableDiffusion3Pipeline"),
    ],
)
def test_other_models_are_refused_with_the_evidence(
    folder: Path, changes: dict[str, Any], pipeline: str, evidence: str
) -> None:
    change_json(folder / "unet" / "config.json", **changes)
    change_json(folder / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelError, match=f"{evidence}.*This version trains SD 1.x, SD 2.x, SDXL"):
        load(folder)


def test_a_family_that_the_base_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model.family is 'sdxl', but this is SD 1.x: its UNet has cross_attention_dim 32"
    ):
        load(folder, family="sdxl")
    assert load(folder, family="sd1").family == "sd1"


def test_nan_in_a_base_weight_is_an_error_that_names_the_tensor(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["conv_out.bias"][1] = float("nan")
        return tensors

    change_weights(folder / UNET_WEIGHTS, damage)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors: conv_out.bias holds NaN or infinity"):
        load(folder)


def test_weights_of_another_model_are_listed(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors.pop("conv_in.bias")
        return tensors | {"extra.weight": torch.zeros(2), "conv_out.bias": torch.zeros(3)}

    change_weights(folder / UNET_WEIGHTS, damage)
    expected = r"3 of \d+ tensors: conv_in.bias is missing; extra.weight is unknown; conv_out.bias has shape \(3,\)"
    with pytest.raises(ModelError, match=expected):
        load(folder)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, length: int) -> None:
    data = (folder / UNET_WEIGHTS).read_bytes()
    (folder / UNET_WEIGHTS).write_bytes(data[:length])
    with pytest.raises(UserError, match=f"{UNET_WEIGHTS}: .*cut short"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"unet/config.json"):
        load(folder)


def test_a_pickled_checkpoint_is_refused_with_a_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "base one.ckpt"
    torch.save({"state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3).T}, "epoch": 3}, path)
    with pytest.raises(ModelError, match="can run code, and are not opened") as raised:
        load_model(path)
    command = shlex.split(str(raised.value).splitlines()[-1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["a.weight"], torch.arange(6.0).reshape(2, 3).T)


def test_a_config_that_describes_no_model_is_named(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", addition_embed_type="text_time", cross_attention_dim=2048)
    with pytest.raises(ModelError, match=r"unet/config.json: no unet can be made of it"):
        load_model(folder)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_a_vae_with_statistics_per_channel_is_refused(folder: Path, name: str) -> None:
    change_json(folder / "vae" / "config.json", **{name: [0.5, -1.0, 2.0, 0.0]})
    with pytest.raises(ModelError, match=f"vae/config.json has {name}: .*Give another base"):
        load(folder)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}, path)
    with pytest.raises(ModelError, match="no UNet in the Stable Diffusion layout"):
        load_model(path)


def test_cpu_is_asked_whether_it_has_bf16() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert has_fast_bf16() or "avx512_bf16" not in flags
