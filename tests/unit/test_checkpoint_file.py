"""Base models on disk: which layer is where, and copies that differ in the layers named and in nothing else."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_diffusion.container import ContainerError, read_header
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.checkpoint_file import BaseWeights, Change, write_changed
from lora_diffusion.formats.checkpoint_layout import BaseFileError
from lora_diffusion.models.families import family_of_checkpoint
from lora_diffusion.models.load import load_model
from tests.single_file import make_single_file

TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_up_blocks_0_upsamplers_0_conv"
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
Q_PROJ = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def noise(weight: Tensor) -> Tensor:
    return 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))


CHANGES: dict[str, Change] = dict.fromkeys((TO_Q, CONV, FC1, Q_PROJ), noise)


def converted(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """The file or folder with all its weights in `dtype`."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.to(dtype) for key, tensor in load_file(source).items()}, target, {"format": "pt"})
        return target
    for path in source.rglob("*.*"):
        if path.suffix == ".safetensors":
            converted(path, target / path.relative_to(source), dtype)
        else:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(source))
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw(path: Path) -> dict[str, bytes]:
    """Key → bytes, in the order of the header."""
    header, data = read_header(path), path.read_bytes()
    start = header.data_start
    return {key: data[start + info.begin : start + info.end] for key, info in header.tensors.items()}


def assert_changed_only(old: Path, new: Path, expected: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """The two files have the same table of tensors, and the same bytes in all but the keys of `expected`."""
    assert read_header(old).tensors == read_header(new).tensors
    old_bytes, new_bytes, before, after = raw(old), raw(new), load_file(old), load_file(new)
    assert list(old_bytes) == list(new_bytes)
    assert {key for key in old_bytes if old_bytes[key] != new_bytes[key]} == expected.keys()
    for key, change in expected.items():
        assert torch.equal(after[key], change(before[key])), key


def rounded_once(weight: Tensor) -> Tensor:
    return (weight.float() + noise(weight)).to(weight.dtype)


def sd2_like() -> dict[str, Tensor]:
    return unet_like(64, linear=True) | openclip_like("cond_stage_model.model.", layers=(0, 23))


def sdxl_like() -> dict[str, Tensor]:
    tensors = unet_like(64, linear=True) | openclip_like("conditioner.embedders.1.model.", layers=(0, 1))
    tensors |= {"model.diffusion_model.label_emb.0.0.weight": torch.randn(8, 12)}
    first = "conditioner.embedders.0.transformer.text_model."
    tensors[f"{first}encoder.layers.0.self_attn.q_proj.weight"] = torch.randn(6, 6)
    tensors[f"{first}embeddings.position_ids"] = torch.arange(7)[None]
    return tensors | {"v_pred": torch.zeros(0), "first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3)}


def unet_like(width: int, *, linear: bool) -> dict[str, Tensor]:
    unet, block = "model.diffusion_model.", "model.diffusion_model.input_blocks.1.1."
    return {
        f"{unet}input_blocks.0.0.weight": torch.randn(8, 4, 3, 3),
        f"{unet}input_blocks.0.0.bias": torch.randn(8),
        f"{unet}input_blocks.3.0.op.weight": torch.randn(8, 8, 3, 3),
        f"{block}proj_in.weight": torch.randn(8, 8) if linear else torch.randn(8, 8, 1, 1),
        f"{block}transformer_blocks.0.attn2.to_k.weight": torch.randn(8, width),
        f"{unet}input_blocks.4.0.in_layers.2.weight": torch.randn(8, 8, 3, 3),
        f"{unet}output_blocks.2.2.conv.weight": torch.randn(8, 8, 3, 3),
    }


def openclip_like(prefix: str, layers: tuple[int, ...]) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}token_embedding.weight": torch.randn(9, 6),
        f"{prefix}positional_embedding": torch.randn(7, 6),
        f"{prefix}text_projection": torch.randn(6, 5),
        f"{prefix}logit_scale": torch.randn(()),
    }
    for layer in layers:
        stem = f"{prefix}transformer.resblocks.{layer}."
        tensors |= {
            f"{stem}attn.in_proj_weight": torch.randn(18, 6),
            f"{stem}attn.in_proj_bias": torch.randn(18),
            f"{stem}attn.out_proj.weight": torch.randn(6, 6),
            f"{stem}mlp.c_fc.weight": torch.randn(24, 6),
            f"{stem}mlp.c_proj.weight": torch.randn(6, 24),
            f"{stem}ln_1.weight": torch.randn(6),
        }
    return tensors


@pytest.fixture(scope="module")
def single_file(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_single_file(tiny_sd1, tmp_path_factory.mktemp("single") / "tiny.safetensors")


def test_a_folder_and_its_single_file_have_the_same_layers(tiny_sd1: Path, single_file: Path) -> None:
    folder, file = BaseWeights.open(tiny_sd1), BaseWeights.open(single_file)

    assert folder.family == file.family == "sd1"
    assert folder.layers.keys() == file.layers.keys()
    assert len(folder.layers) > 150
    assert CHANGES.keys() <= folder.layers.keys()
    for name in folder.layers:
        assert torch.equal(folder.read(name), file.read(name))
    assert folder.others.keys() <= file.others.keys()
    for name in folder.others:
        assert torch.equal(folder.read(name), file.read(name))


def test_layers_have_the_names_that_adapters_of_the_model_get(tiny_sd1: Path) -> None:
    parts = load_model(tiny_sd1).parts
    names = {
        part.file_name(path)
        for part in parts.values()
        for path, module in part.module.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert BaseWeights.open(tiny_sd1).layers.keys() == names


def test_every_tensor_is_a_layer_or_one_of_the_others(tiny_sd1: Path, single_file: Path) -> None:
    for path, files in ((tiny_sd1, [UNET_FILE, TEXT_FILE]), (single_file, [""])):
        base = BaseWeights.open(path)
        keys = [key for file in files for key in read_header(path / file if file else path).tensors]
        places = [*base.layers.values(), *base.others.values()]
        assert sorted(place.key for place in places) == sorted(keys)
        assert not [name for name in base.layers if "norm" in name or "embeddings" in name]
        assert all(len(place.shape) in (2, 4) for place in base.layers.values())


def test_text_encoders_have_the_same_names_without_the_text_model_level(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    shutil.copytree(tiny_sd1, folder)
    flat = {key.removeprefix("text_model."): tensor for key, tensor in load_file(folder / TEXT_FILE).items()}
    save_file(flat, folder / TEXT_FILE)

    with_level, without = BaseWeights.open(tiny_sd1), BaseWeights.open(folder)
    assert without.layers.keys() == with_level.layers.keys() and without.others.keys() == with_level.others.keys()
    write_changed(without, tmp_path / "out", {FC1: noise})
    assert_changed_only(
        folder / TEXT_FILE, tmp_path / "out" / TEXT_FILE, {"encoder.layers.0.mlp.fc1.weight": rounded_once}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_a_folder_differs_in_the_layers_named_only(
    tiny_sd1: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, out = converted(tiny_sd1, tmp_path / "base", dtype), tmp_path / "out"
    write_changed(BaseWeights.open(source), out, CHANGES)

    before, after = contents(source), contents(out)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {UNET_FILE, TEXT_FILE}
    unet = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": rounded_once,
        "up_blocks.0.upsamplers.0.conv.weight": rounded_once,
    }
    text = {
        "text_model.encoder.layers.0.mlp.fc1.weight": rounded_once,
        "text_model.encoder.layers.1.self_attn.q_proj.weight": rounded_once,
    }
    assert_changed_only(source / UNET_FILE, out / UNET_FILE, unet)
    assert_changed_only(source / TEXT_FILE, out / TEXT_FILE, text)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_a_single_file_differs_in_the_layers_named_only(
    single_file: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, out = converted(single_file, tmp_path / "base.safetensors", dtype), tmp_path / "out.safetensors"
    write_changed(BaseWeights.open(source), out, CHANGES)
    text = "cond_stage_model.transformer.text_model.encoder.layers."
    keys = (
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        f"{text}0.mlp.fc1.weight",
        f"{text}1.self_attn.q_proj.weight",
    )

    assert_changed_only(source, out, dict.fromkeys(keys, rounded_once))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def test_a_change_of_zero_gives_the_same_file(tiny_sd1: Path, single_file: Path, tmp_path: Path) -> None:
    changes: dict[str, Change] = {name: torch.zeros_like for name in BaseWeights.open(tiny_sd1).layers}
    write_changed(BaseWeights.open(tiny_sd1), tmp_path / "out", changes)
    write_changed(BaseWeights.open(single_file), tmp_path / "out.safetensors", changes)

    assert contents(tmp_path / "out") == contents(tiny_sd1)
    assert (tmp_path / "out.safetensors").read_bytes() == single_file.read_bytes()


@pytest.mark.parametrize(
    ("family", "make", "prefix", "stem"),
    [
        ("sd2", sd2_like, "lora_te_", "cond_stage_model.model."),
        ("sdxl", sdxl_like, "lora_te2_", "conditioner.embedders.1.model."),
    ],
)
def test_q_k_and_v_of_openclip_are_thirds_of_one_tensor(
    tmp_path: Path, family: str, make: Callable[[], dict[str, Tensor]], prefix: str, stem: str
) -> None:
    torch.manual_seed(0)
    source, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    tensors = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in make().items()}
    save_file(tensors, source)
    base = BaseWeights.open(source)
    layer = f"{prefix}text_model.encoder_layers_0_".replace(".", "_")
    key = f"{stem}transformer.resblocks.0.attn.in_proj_weight"

    assert base.family == family == family_of_checkpoint({k: tuple(t.shape) for k, t in tensors.items()}).family
    thirds = torch.cat([base.read(f"{layer}self_attn_{x}_proj") for x in "qkv"])
    assert torch.equal(thirds, tensors[key].float())

    def changed(stacked: Tensor) -> Tensor:
        return torch.cat([rounded_once(stacked[:6]), stacked[6:12], rounded_once(stacked[12:])])

    names = [f"{layer}self_attn_q_proj", f"{layer}self_attn_v_proj", f"{layer}mlp_fc2"]
    write_changed(base, out, dict.fromkeys(names, noise))
    expected = {key: changed, f"{stem}transformer.resblocks.0.mlp.c_proj.weight": rounded_once}
    assert_changed_only(source, out, expected)


def test_layers_of_sd2_and_sdxl_have_the_names_of_adapter_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(sd2_like(), tmp_path / "sd2.safetensors")
    save_file(sdxl_like(), tmp_path / "sdxl.safetensors")
    sd2, sdxl = (BaseWeights.open(tmp_path / f"{name}.safetensors") for name in ("sd2", "sdxl"))
    unet = {
        "lora_unet_conv_in",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_1_resnets_0_conv1",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    }
    names = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    layers = [{f"text_model_encoder_layers_{number}_{name}" for name in names} for number in (0, 1)]

    assert sd2.layers.keys() == unet | {f"lora_te_{name}" for name in layers[0]}  # the 24th layer is not used
    te1 = {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj"}
    te2 = {f"lora_te2_{name}" for name in layers[0] | layers[1]}
    assert sdxl.layers.keys() == unet | te1 | te2 | {"lora_unet_add_embedding_linear_1", "lora_te2_text_projection"}
    assert {"v_pred", "first_stage_model.decoder.conv_in.weight", "unet.conv_in.bias"} <= sdxl.others.keys()
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj.bias" in sdxl.others
    projection = load_file(tmp_path / "sdxl.safetensors")["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(sdxl.read("lora_te2_text_projection"), projection.T)
    assert sdxl.layers["lora_te2_text_projection"].shape == (5, 6)
    assert "text_encoder.text_projection.weight" in sd2.others, "which no part of SD 2.x reads"
    assert sdxl.read("text_encoder.text_model.embeddings.position_ids").tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_the_sdxl_refiner_is_no_base(tmp_path: Path) -> None:
    tensors = unet_like(1280, linear=True) | {"model.diffusion_model.label_emb.0.0.weight": torch.randn(8, 12)}
    save_file(tensors, tmp_path / "refiner.safetensors")
    with pytest.raises(BaseFileError, match="is the SDXL refiner"):
        BaseWeights.open(tmp_path / "refiner.safetensors")


def test_a_hub_snapshot_of_links_becomes_a_folder_of_files(tiny_sd1: Path, tmp_path: Path) -> None:
    snapshot, blobs, out = tmp_path / "snapshot", tmp_path / "blobs", tmp_path / "out"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in tiny_sd1.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(tiny_sd1)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    (snapshot / "nowhere").symlink_to(tmp_path / "gone")
    write_changed(BaseWeights.open(snapshot), out, {TO_Q: noise})

    assert contents(out).keys() == contents(tiny_sd1).keys()
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert contents(snapshot) == contents(tiny_sd1)


def test_shards_and_their_index_stay_as_they_are(tiny_sd1: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_sd1, folder)
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    of_shard = {key: names["up_blocks" in key] for key in tensors}
    for name in names:
        save_file({key: tensor for key, tensor in tensors.items() if of_shard[key] == name}, folder / "unet" / name)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": of_shard}))
    base = BaseWeights.open(folder)
    assert base.layers.keys() == BaseWeights.open(tiny_sd1).layers.keys()

    write_changed(base, out, {CONV: noise})
    before, after = contents(folder), contents(out)
    assert {name for name in before if before[name] != after[name]} == {f"unet/{names[1]}"}
    assert_changed_only(
        folder / "unet" / names[1], out / "unet" / names[1], {"up_blocks.0.upsamplers.0.conv.weight": rounded_once}
    )

    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ContainerError, match="not a plain file name"):
        BaseWeights.open(folder)


def test_half_precision_is_read_where_it_is_all_there_is(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = converted(tiny_sd1, tmp_path / "base", torch.float16)
    (folder / UNET_FILE).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    base = BaseWeights.open(folder)
    assert base.layers[TO_Q].dtype == "F16"
    assert base.layers[TO_Q].file.name == "diffusion_pytorch_model.fp16.safetensors"


def test_a_copy_may_have_a_name_of_many_bytes(tiny_sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / ("猫" * 84)  # 252 bytes; names have 255 at most
    write_changed(BaseWeights.open(tiny_sd1), out, {TO_Q: noise})

    assert contents(out).keys() == contents(tiny_sd1).keys()


def test_variants_that_keep_the_old_weights_are_named(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd1, folder)
    shutil.copy(folder / UNET_FILE, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    write_changed(BaseWeights.open(folder), tmp_path / "out", {TO_Q: noise})

    assert contents(tmp_path / "out").keys() == contents(folder).keys()
    assert [record.args for record in caplog.records] == [(Path("unet/diffusion_pytorch_model.fp16.safetensors"),)]


def test_metadata_is_added_and_what_would_lie_is_dropped(single_file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    old = {"format": "pt", "modelspec.title": "Tiny", "modelspec.hash_sha256": "0x12"}
    save_file(load_file(single_file), source, old)
    write_changed(BaseWeights.open(source), out, {FC1: noise}, metadata={"modelspec.title": "Tïny baked", "x": "1"})

    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "Tïny baked", "x": "1"}
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert_changed_only(source, out, {key: rounded_once})
    assert read_header(out).data_start % 8 == 0


def test_progress_passes_every_tensor_of_a_changed_file(single_file: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def track(items, description):
        seen.append(len(items))
        assert "out.safetensors" in description
        return items

    write_changed(BaseWeights.open(single_file), tmp_path / "out.safetensors", {FC1: noise}, track=track)
    assert seen == [len(read_header(single_file).tensors)]


def test_nothing_is_overwritten(tiny_sd1: Path, single_file: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "base", tmp_path / "base.safetensors"
    shutil.copytree(tiny_sd1, folder)
    shutil.copy(single_file, file)
    (tmp_path / "there").mkdir()
    (tmp_path / "there.safetensors").write_text("mine")
    before = contents(tmp_path)
    for base, out, reason in (
        (folder, folder, "is the base itself"),
        (file, file, "is the base itself"),
        (folder, tmp_path / "there", "exists already"),
        (file, tmp_path / "there.safetensors", "exists already"),
        (folder, folder / "inside", "inside the base"),
        (folder, tmp_path / "new.safetensors", "must not end in"),
        (file, tmp_path / "new", "must end in"),
        (file, tmp_path / "no" / "new.safetensors", "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            write_changed(BaseWeights.open(base), out, {FC1: noise})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_rounded_and_its_end_is_not_overrun(single_file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source, out = converted(single_file, tmp_path / "base.safetensors", dtype), tmp_path / "out.safetensors"
    base = BaseWeights.open(source)
    with pytest.raises(BaseFileError, match=r"fc1\.weight would no longer be finite"):
        write_changed(base, out, {FC1: lambda weight: torch.full_like(weight, 1e5)})
    write_changed(base, out, {FC1: noise})
    assert torch.equal(BaseWeights.open(out).read(FC1), rounded_once(base.read(FC1).to(dtype)).float())


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_weight_that_leaves_half_precision_is_refused_by_name(
    tiny_sd1: Path, single_file: Path, tmp_path: Path, form: str
) -> None:
    source, out = {
        "folder": (tiny_sd1, tmp_path / "out"),
        "file": (single_file, tmp_path / "out.safetensors"),
    }[form]
    base = BaseWeights.open(converted(source, tmp_path / f"base{source.suffix}", torch.float16))
    before = contents(tmp_path)
    for value in (7e4, float("nan")):
        with pytest.raises(BaseFileError, match=r"fc1\.weight would no longer be finite"):
            write_changed(base, out, {FC1: lambda weight, value=value: torch.full_like(weight, value)})
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unknown_layer_or_a_wrong_shape_is_refused(single_file: Path, tmp_path: Path) -> None:
    base = BaseWeights.open(single_file)
    with pytest.raises(BaseFileError, match="has no layer lora_unet_foo"):
        write_changed(base, tmp_path / "out.safetensors", {"lora_unet_foo": noise})
    with pytest.raises(ValueError, match="has shape"):
        write_changed(base, tmp_path / "out.safetensors", {FC1: lambda weight: weight[:1]})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_base_is_refused_with_its_name(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd1, folder)
    (folder / UNET_FILE).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ContainerError, match="a pickle"):
        BaseWeights.open(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(
        ContainerError, match=r"model.safetensors is missing, and so is diffusion_pytorch_model.fp16.safetensors"
    ):
        BaseWeights.open(folder)
    with pytest.raises(ContainerError, match="no such file"):
        BaseWeights.open(tmp_path / "gone.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04" + struct.pack("<Q", 0) * 3)
    with pytest.raises(ContainerError, match="pickled"):
        BaseWeights.open(tmp_path / "a.ckpt")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(BaseFileError, match="no UNet"):
        BaseWeights.open(tmp_path / "lora.safetensors")
    tensors = unet_like(64, linear=False)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    with pytest.raises(BaseFileError, match="inpainting"):
        BaseWeights.open(tmp_path / "inpainting.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("scaled_fp8", "model.diffusion_model.scaled_fp8", "model.diffusion_model.out.2.scale_weight"),
        *("mid_block.proj_in.weight_scale", "mid_block.proj_in.comfy_quant"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_that_others_scale_are_refused(
    tiny_sd1: Path, single_file: Path, tmp_path: Path, name: str, form: str
) -> None:
    """ΔW would be added to values that are not the weights, and be lost when they are scaled."""
    base = tmp_path / ("base" if form == "folder" else "base.safetensors")
    (shutil.copytree if form == "folder" else shutil.copy)(tiny_sd1 if form == "folder" else single_file, base)
    weights = base / UNET_FILE if form == "folder" else base
    save_file(load_file(weights) | {name: torch.tensor(2.0)}, weights)
    with pytest.raises(BaseFileError, match=rf"{weights}: its weights are scaled fp8 \({name} says so\)"):
        BaseWeights.open(base)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_odd_files_are_left_out_and_links_to_folders_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd1, folder)
    os.mkfifo(folder / "pipe")
    write_changed(BaseWeights.open(folder), tmp_path / "out", {FC1: noise})
    assert contents(tmp_path / "out").keys() == contents(tiny_sd1).keys()

    shutil.rmtree(folder / "vae")
    (folder / "vae").symlink_to(tiny_sd1 / "vae")
    with pytest.raises(BaseFileError, match="link to a folder"):
        write_changed(BaseWeights.open(folder), tmp_path / "again", {FC1: noise})
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_nothing_behind(single_file: Path, tmp_path: Path) -> None:
    import resource

    base, limits = BaseWeights.open(single_file), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (single_file.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"out\.safetensors: could not be written whole"):
            write_changed(base, tmp_path / "out.safetensors", {FC1: noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
