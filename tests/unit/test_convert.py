"""Other names, the same numbers: bit by bit in our arithmetic, and as weights in diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.container import read_header
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.models.load import load_model
from lora_diffusion.tools.convert import convert_file
from tests.adapter_parts import (
    CONV,
    LDM_CONV,
    LDM_K,
    LDM_Q,
    TE,
    TE1,
    K,
    Parts,
    Q,
    loha,
    lora,
    randn,
    saved,
    sd1_modules,
    sdxl_modules,
    tucker,
)
from tests.random_adapters import random_adapter


def dora(parts: Parts, axis: int) -> Parts:
    outputs, inputs = parts["lora_up.weight"].shape[0], parts["lora_down.weight"].shape[1]
    shape = [1] * parts["lora_down.weight"].ndim
    shape[axis] = outputs if axis == 0 else inputs
    return parts | {"dora_scale": randn(*shape, seed=21).abs()}


def there_and_back(source: Path, tmp_path: Path) -> Path:
    convert_file(source, tmp_path / "peft.safetensors", "peft")
    convert_file(tmp_path / "peft.safetensors", tmp_path / "back.safetensors", "kohya")
    return tmp_path / "back.safetensors"


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) >= 3
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("modules", [sd1_modules(), sdxl_modules(ldm=True)], ids=["SD1", "SDXL"])
def test_peft_and_back_is_the_same_file_bit_for_bit(
    tmp_path: Path, modules: dict[str, Parts], dtype: torch.dtype
) -> None:
    saved(tmp_path / "a.safetensors", modules, {"ss_output_name": "ink"}, dtype=dtype)
    convert_file(tmp_path / "a.safetensors", tmp_path / "kohya.safetensors", "kohya")
    back = there_and_back(tmp_path / "a.safetensors", tmp_path)

    expected = load_file(tmp_path / "a.safetensors")
    alphas = {key: tensor.float() for key, tensor in expected.items() if key.endswith(".alpha")}  # always float32
    assert_same_tensors(load_file(back), expected | alphas)
    assert back.read_bytes() == (tmp_path / "kohya.safetensors").read_bytes()


def test_sdxl_in_the_block_names_of_diffusers_comes_back_in_those_of_sd_scripts(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", sdxl_modules(ldm=False))
    expected = load_file(saved(tmp_path / "ldm.safetensors", sdxl_modules(ldm=True)))

    assert_same_tensors(load_file(there_and_back(source, tmp_path)), expected)
    assert {key.partition(".")[0] for key in expected} >= {LDM_Q, LDM_K, LDM_CONV}


def test_dora_per_output_goes_to_peft_and_back(tmp_path: Path) -> None:
    modules = {Q: dora(lora(), 0), CONV: dora(lora(kernel=(3, 3)), 0)}
    source = saved(tmp_path / "a.safetensors", modules)

    assert_same_tensors(load_file(there_and_back(source, tmp_path)), load_file(source))


def test_weights_of_several_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    modules = {Q: lora(), K: lora(inputs=768)}
    modules[K]["lora_up.weight"] = modules[K]["lora_up.weight"].half()
    modules[Q]["lora_down.weight"] = modules[Q]["lora_down.weight"].bfloat16()
    source = tmp_path / "a.safetensors"
    save_file({f"{name}.{part}": t for name, parts in modules.items() for part, t in parts.items()}, source)

    assert_same_tensors(load_file(there_and_back(source, tmp_path)), load_file(source))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_precision_rounds_the_weights_once(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    source = saved(tmp_path / "a.safetensors", sd1_modules())
    convert_file(source, tmp_path / "b.safetensors", "kohya", precision=precision)
    expected = {
        key: t if key.endswith("alpha") else t.to(dtype) for key, t in load_file(tmp_path / "a.safetensors").items()
    }

    assert_same_tensors(load_file(tmp_path / "b.safetensors"), expected)


def test_a_precision_that_a_value_does_not_fit_is_an_error(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: {part: 1e6 * t for part, t in lora().items()}})

    with pytest.raises(RunError, match=r"not finite as float16.*save as float32"):
        convert_file(source, tmp_path / "b.safetensors", "kohya", precision="fp16")
    assert not (tmp_path / "b.safetensors").exists()


# --- older and rarer files -------------------------------------------------------------------------------------------


def test_a_numbered_file_gets_names_and_alphas(tmp_path: Path) -> None:
    down, up = randn(4, 320), randn(320, 4)
    save_file({"unet:0:down": down, "unet:0:up": up, "<s1>": randn(768)}, tmp_path / "a.safetensors")
    conversion = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

    assert_same_tensors(
        load_file(tmp_path / "b.safetensors"),
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)},
    )
    assert conversion.notes == ("1 tensors were not read: <s1>",)


def test_old_diffusers_names_become_kohya_names(tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    save_file({f"{path}.down.weight": randn(4, 8), f"{path}.up.weight": randn(8, 4)}, tmp_path / "a.safetensors")
    convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")

    assert AdapterFile.read(tmp_path / "b.safetensors").modules.keys() == {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    }


@pytest.mark.parametrize(
    ("given", "usual", "version"),
    [
        (TE1, TE, "sd_v1"),
        (TE, TE1, "sdxl_base_v1-0"),
        (TE.replace("text_model_", ""), TE, "sd_v1"),
        (TE.replace("text_model_", ""), TE, ""),
        (TE1, TE1, ""),
    ],
)
def test_rare_names_of_text_encoders_become_the_usual_ones(
    tmp_path: Path, given: str, usual: str, version: str
) -> None:
    source = saved(tmp_path / "a.safetensors", {given: lora()}, {"ss_base_model_version": version})
    conversion = convert_file(source, tmp_path / "b.safetensors", "kohya")

    assert AdapterFile.read(tmp_path / "b.safetensors").modules.keys() == {usual}
    assert len(conversion.notes) == (given != usual)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_magnitudes_of_a_dora_are_rounded_in_no_format(tmp_path: Path, precision: str) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: dora(lora(), 0)})
    scale = load_file(source)[f"{Q}.dora_scale"]
    convert_file(source, tmp_path / "peft.safetensors", "peft", precision=precision)
    convert_file(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "kohya", precision=precision)

    (magnitudes,) = (t for key, t in load_file(tmp_path / "peft.safetensors").items() if "magnitude" in key)
    assert magnitudes.dtype == torch.float32
    assert torch.equal(magnitudes, scale.flatten())
    assert torch.equal(load_file(tmp_path / "kohya.safetensors")[f"{Q}.dora_scale"], scale)


def test_a_module_under_a_rare_and_a_usual_name_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {TE: lora(), TE1: lora()}, {"ss_base_model_version": "sd_v1"})

    with pytest.raises(AdapterFileError, match="has two names"):
        convert_file(source, tmp_path / "b.safetensors", "kohya")


def test_a_missing_alpha_is_written_and_told(tmp_path: Path) -> None:
    parts = lora(rank=4)
    del parts["alpha"]
    conversion = convert_file(saved(tmp_path / "a.safetensors", {Q: parts}), tmp_path / "b.safetensors", "kohya")

    assert load_file(tmp_path / "b.safetensors")[f"{Q}.alpha"] == 4.0
    assert conversion.notes == ("1 modules had no alpha; it is written as their rank, which every reader assumes",)


def test_metadata_goes_along_and_what_describes_tensors_is_made_anew(tmp_path: Path) -> None:
    given = {"ss_output_name": "ink", "modelspec.title": "Ink", "own": "text", "sshs_model_hash": "false"}
    false = {"ss_network_dim": "5", "modelspec.hash_sha256": "0x12"}
    source = saved(tmp_path / "a.safetensors", sd1_modules(), given | false)
    metadata = read_header(there_and_back(source, tmp_path)).metadata

    assert {key: metadata[key] for key in given if key[:4] != "sshs"} == {k: given[k] for k in given if k[:4] != "sshs"}
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert len(metadata["sshs_model_hash"]) == 64
    assert "modelspec.hash_sha256" not in metadata
    assert "lora_adapter_metadata" not in metadata


# --- what a format cannot hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({Q: loha()}, "PEFT files hold LoRA only, not loha"),
        ({Q: dora(lora(), 1)}, "magnitudes per input"),
        ({Q: dora(lora(), 0), K: lora(inputs=768)}, "some modules of its unet are DoRA and some, such as"),
        ({"lora_unet_strange_layer": lora()}, "no PEFT name for this module"),
    ],
)
def test_peft_refuses_what_it_cannot_hold(tmp_path: Path, modules: dict[str, Parts], reason: str) -> None:
    source = saved(tmp_path / "a.safetensors", modules)

    with pytest.raises(AdapterFileError, match=reason):
        convert_file(source, tmp_path / "b.safetensors", "peft")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_tucker_core_becomes_part_of_a_peft_factor_and_that_is_told(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {CONV: tucker()})
    conversion = convert_file(source, tmp_path / "b.safetensors", "peft")
    (down,) = (t for key, t in load_file(tmp_path / "b.safetensors").items() if "lora_A" in key)

    assert down.shape == (4, 8, 3, 3)
    assert "Tucker cores of 1 convolutions" in conversion.notes[0]


@pytest.mark.parametrize(
    ("options", "reason"), [({"format": "ckpt"}, "--format ckpt"), ({"precision": "int8"}, "--precision int8")]
)
def test_unknown_formats_and_precisions_are_named(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **({"format": "kohya"} | options))


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_by_hand(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A file of mixed ranks and alphas, and the base's weights with its changes added in float64."""
    model = load_model(tiny_sd1)
    full = random_adapter(model, seed=1, parts=("unet", "text_encoder"), targets="full")
    modules: dict[str, Parts] = {}
    for i, (name, parts) in enumerate(full.modules.items()):
        rank = 4 if i % 3 else 2
        # Where attention has several alphas, diffusers misreads kohya files: one there, others in other layers.
        is_attention = "_attn" in name or name.startswith("lora_te")
        modules[name] = {
            "lora_down.weight": parts["lora_down.weight"][:rank],
            "lora_up.weight": parts["lora_up.weight"][:, :rank],
            "alpha": torch.tensor(3.0 if is_attention else (3.0, 1.5, 3.0)[i % 3]),
        }
    path = saved(
        tmp_path_factory.mktemp("mixed") / "a.safetensors", modules, {"modelspec.architecture": "stable-diffusion-v1"}
    )
    expected: dict[str, Tensor] = {}
    for match in AdapterFile.read(path).attach(model.parts).matches:
        down, up = match.tensors["lora_down.weight"].double(), match.tensors["lora_up.weight"].double()
        delta = match.tensors["alpha"].item() / down.shape[0] * up.flatten(1) @ down.flatten(1)
        expected[f"{match.part}.{match.path}"] = match.layer.weight + delta.reshape(match.layer.weight.shape)
    return path, expected


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_fuses_both_forms_to_the_same_weights(
    tiny_sd1: Path, weights_by_hand: tuple[Path, dict[str, Tensor]], tmp_path: Path, format: str
) -> None:
    source, expected = weights_by_hand
    conversion = convert_file(source, tmp_path / "b.safetensors", format)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = {
        f"{part}.{name.removesuffix('.weight')}": tensor
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }

    assert len(expected) == 189
    assert conversion.readers["diffusers"].verdict == "as trained"
    for name, weight in expected.items():
        torch.testing.assert_close(fused[name].double(), weight.double(), atol=1e-6, rtol=1e-5)  # float32 sums


def test_diffusers_misreads_attention_with_several_alphas_as_its_table_says(tiny_sd1: Path, tmp_path: Path) -> None:
    """The reason for a rule in `tools.readers`: when this fails, diffusers has learned to read them."""
    model = load_model(tiny_sd1)
    file = random_adapter(model, seed=1)
    names = [name for name in file.modules if "_attn" in name]
    modules = {name: dict(file.modules[name]) for name in names}
    modules[names[0]]["alpha"] = torch.tensor(1.0)
    conversion = convert_file(saved(tmp_path / "a.safetensors", modules), tmp_path / "b.safetensors", "kohya")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors")
    scales = {m.scaling["default_0"] for m in pipeline.unet.modules() if hasattr(m, "scaling")}

    assert scales == {1.0}  # and not 1 / 4 for the first
    assert conversion.readers["diffusers"].verdict == "differently"
