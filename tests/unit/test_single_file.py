"""Checkpoints in one file: the same model as the folder they were made from, or an error that says why not."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.models.base import DiffusionModel, ModelError
from lora_diffusion.models.load import detect_family, load_model
from lora_diffusion.models.single_file import SD2_PROBE
from tests.single_file import make_single_file
from tests.tiny import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl

ROOT = Path(__file__).parents[2]
MAKE: dict[str, Callable[..., Path]] = {"sd1": make_tiny_sd1, "sd2": make_tiny_sd2, "sdxl": make_tiny_sdxl}


@pytest.fixture(scope="module", params=sorted(MAKE))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; tests must not write into it."""
    return MAKE[request.param](tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("base") / "sdxl", prediction=None)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd2(tmp_path_factory.mktemp("base") / "sd2", prediction=None)


def same_weights(first: DiffusionModel, second: DiffusionModel) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def change(path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(path)), path)


def test_a_single_file_gives_the_same_model_as_the_folder(folder: Path, tmp_path: Path) -> None:
    path = make_single_file(folder, tmp_path / "all.safetensors")
    assert detect_family(path).family == folder.name
    single, whole = load_model(path, configs=folder), load_model(folder)
    assert same_weights(single, whole)
    assert single.text_encoder_id == whole.text_encoder_id, "weights, vocabulary and padding are the same"
    assert single.vae_id == whole.vae_id
    assert torch.equal(single.schedule.alphas_cumprod, whole.schedule.alphas_cumprod)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_without_another_rounding(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = make_single_file(folder, tmp_path / "half.safetensors", dtype=dtype)
    whole = load_model(folder, dtype=dtype, vae_dtype=dtype)
    assert same_weights(load_model(path, configs=folder, dtype=dtype, vae_dtype=dtype), whole)
    in_full = load_model(path, configs=folder)
    assert torch.equal(in_full.unet.conv_in.weight, whole.unet.conv_in.weight.float())


def test_fp8_files_are_cast(sdxl: Path, tmp_path: Path) -> None:
    path = make_single_file(sdxl, tmp_path / "fp8.safetensors", dtype=torch.float8_e4m3fn)
    weight = load_file(sdxl / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(load_model(path, configs=sdxl).unet.conv_in.weight, weight.to(torch.float8_e4m3fn).float())


def test_scaled_fp8_is_refused(sdxl: Path, tmp_path: Path) -> None:
    extra = {"model.diffusion_model.out.2.scale_weight": torch.tensor(2.0)}
    path = make_single_file(sdxl, tmp_path / "scaled.safetensors", extra=extra)
    with pytest.raises(ModelError, match="scaled fp8"):
        load_model(path, configs=sdxl)


def test_tensors_that_models_are_known_to_carry_are_passed_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["model_ema.decay", "alphas_cumprod", "posterior_mean_coef1", "betas", "first_stage_model.loss.logvar"]
    path = make_single_file(folder, tmp_path / "all.safetensors", extra={name: torch.ones(1) for name in names})
    with caplog.at_level(logging.WARNING):
        load_model(path, configs=folder)
    assert not caplog.records


def test_tensors_that_nothing_reads_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"control_model.weight": torch.ones(1)}
    path = make_single_file(folder, tmp_path / "all.safetensors", extra=extra)
    with caplog.at_level(logging.WARNING):
        load_model(path, configs=folder)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{path}: 1 tensors are not used (the first: control_model.weight)"]


def test_missing_and_misshapen_tensors_are_listed(folder: Path, tmp_path: Path) -> None:
    path = make_single_file(folder, tmp_path / "all.safetensors")

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors.pop("model.diffusion_model.time_embed.0.bias")
        return tensors | {"first_stage_model.decoder.conv_out.bias": torch.zeros(4)}

    change(path, damage)
    expected = (
        r"2 of \d+ tensors: unet: time_embedding.linear_1.bias is missing; "
        r"vae: decoder.conv_out.bias has shape \(4,\) instead of \(3,\)"
    )
    with pytest.raises(ModelError, match=expected):
        load_model(path, configs=folder)


def test_nan_is_an_error_that_names_the_tensor(sd2: Path, tmp_path: Path) -> None:
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    path = make_single_file(sd2, tmp_path / "all.safetensors", extra={key: torch.full((96,), torch.nan)})
    with pytest.raises(ModelError, match=f"{re.escape(key)} holds NaN"):
        load_model(path, configs=sd2)


@pytest.mark.parametrize(
    ("prefix", "what"), [("first_stage_model.", "VAE"), ("conditioner.embedders.1.", "text encoder 2")]
)
def test_a_file_without_a_part_says_which(sdxl: Path, tmp_path: Path, prefix: str, what: str) -> None:
    path = make_single_file(sdxl, tmp_path / "all.safetensors")
    change(path, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefix)})
    with pytest.raises(ModelError, match=f"holds no {what} .*{re.escape(prefix)}"):
        load_model(path, configs=sdxl)


def test_old_files_without_the_text_model_level_are_read(tmp_path: Path) -> None:
    folder = make_tiny_sd1(tmp_path / "base")
    path = make_single_file(folder, tmp_path / "all.safetensors")
    change(path, lambda tensors: {name.replace("text_model.", ""): tensor for name, tensor in tensors.items()})
    assert same_weights(load_model(path, configs=folder), load_model(folder))


def test_a_tokenizer_beside_the_file_is_used_with_the_familys_padding(sd2: Path, tmp_path: Path) -> None:
    path = make_single_file(sd2, tmp_path / "all.safetensors")
    configs = tmp_path / "configs"
    for part in ("unet", "vae", "text_encoder"):
        shutil.copytree(sd2 / part, configs / part, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(sd2 / "tokenizer", tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<|endoftext|>"}))
    found = load_model(path, configs=configs).encode_text(["the red cat"]).hidden
    assert torch.equal(found, load_model(sd2).encode_text(["the red cat"]).hidden)


def test_a_file_without_a_reachable_tokenizer_says_what_to_do(sdxl: Path, tmp_path: Path) -> None:
    path = make_single_file(sdxl, tmp_path / "all.safetensors")
    configs = tmp_path / "configs"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        shutil.copytree(sdxl / part, configs / part, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError) as raised:
        load_model(path, configs=configs)
    message = str(raised.value)
    for place in (str(configs / "tokenizer"), str(tmp_path / "tokenizer"), "openai/clip-vit-large-patch14"):
        assert place in message
    assert "set model.configs" in message
    assert "put vocab.json and merges.txt" in message


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(sd2: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(sd2, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = configs / "tokenizer" / "vocab.json"
    values = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps(values | {"sofa</w>": len(values)}))
    path = make_single_file(sd2, tmp_path / "all.safetensors")
    with pytest.raises(ModelError, match=f"has {len(values) + 1} tokens, but .* knows {len(values)}"):
        load_model(path, configs=configs)


def test_configs_that_are_no_folder_are_an_error(sdxl: Path, tmp_path: Path) -> None:
    path = make_single_file(sdxl, tmp_path / "all.safetensors")
    with pytest.raises(ModelError, match=r"model.configs is .*nowhere.*no folder"):
        load_model(path, configs=tmp_path / "nowhere")


def test_configs_beside_a_folder_are_said_not_to_be_used(
    sd2: Path, sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(make_single_file(sd2, tmp_path / "all.safetensors"), configs=sd2)
    assert "model.configs" not in caplog.text
    assert load_model(sd2, configs=sdxl).scheduler_config == load_model(sd2).scheduler_config
    assert f"model.configs is not used: it is for single-file checkpoints, and {sd2} is a folder" in caplog.text


def test_a_file_of_another_size_than_the_published_one_needs_configs(folder: Path, tmp_path: Path) -> None:
    path = make_single_file(folder, tmp_path / "all.safetensors")
    with pytest.raises(ModelError, match=r"does not fit the configs of sd.*set model.configs"):
        load_model(path)


# What a file says of its noise schedule


def test_markers_make_a_velocity_model_with_zero_terminal_snr(sdxl: Path, tmp_path: Path) -> None:
    extra = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = make_single_file(sdxl, tmp_path / "v.safetensors", extra=extra)
    model = load_model(path, configs=sdxl)
    assert model.schedule.prediction == "v"
    assert float(model.schedule.alphas_cumprod[-1]) == 0
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.scheduler_config["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize(
    ("setting", "evidence"),
    [
        ({"prediction": "epsilon"}, "model.prediction is 'epsilon', but the file has the marker 'v_pred'"),
        ({"zero_terminal_snr": False}, "model.zero_terminal_snr is false, but the file has the marker 'ztsnr'"),
    ],
)
def test_a_setting_against_a_marker_is_refused(
    sdxl: Path, tmp_path: Path, setting: dict[str, object], evidence: str
) -> None:
    extra = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = make_single_file(sdxl, tmp_path / "v.safetensors", extra=extra)
    with pytest.raises(ModelError, match=evidence):
        load_model(path, configs=sdxl, **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("marker", ["edm_vpred.sigma_max", "edm_mean", "edm_std"])
def test_a_file_of_another_noise_process_is_refused(sdxl: Path, tmp_path: Path, marker: str) -> None:
    path = make_single_file(sdxl, tmp_path / "edm.safetensors", extra={marker: torch.ones(4)})
    with pytest.raises(ModelError, match=rf"edm.safetensors: holds the tensor {marker}: .*EDM or flow matching"):
        load_model(path, configs=sdxl)


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ({"modelspec.prediction_type": ""}, "epsilon"),
        ({}, "epsilon"),
    ],
)
def test_metadata_tells_the_prediction(sd2: Path, tmp_path: Path, metadata: dict[str, str], prediction: str) -> None:
    path = make_single_file(sd2, tmp_path / "m.safetensors", metadata=metadata)
    change_probe(path, spread=0.05)
    model = load_model(path, configs=sd2)
    assert model.schedule.prediction == prediction
    assert model.base_model_version == ("sd_v2_v" if prediction == "v" else "sd_v2")


@pytest.mark.parametrize("named", ["rectified_flow", "sample"])
def test_metadata_that_names_another_prediction_is_refused(sd2: Path, tmp_path: Path, named: str) -> None:
    path = make_single_file(sd2, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": named})
    message = rf"m.safetensors: its metadata says modelspec.prediction_type {named}; this version trains epsilon and v"
    with pytest.raises(ModelError, match=message):
        load_model(path, configs=sd2)


def change_probe(path: Path, spread: float) -> None:
    """Sets the standard deviation of the weight whose spread differs between the published SD 2.x models."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    values = torch.linspace(-1, 1, tensors[SD2_PROBE].numel())
    save_file(tensors | {SD2_PROBE: values * (spread / values.std(correction=0))}, path, metadata)


@pytest.mark.parametrize(("spread", "guess"), [(0.05, "epsilon"), (0.12, "v")])
def test_the_spread_of_a_weight_is_a_guess_for_sd2_that_settings_overrule(
    sd2: Path, tmp_path: Path, spread: float, guess: str
) -> None:
    path = make_single_file(sd2, tmp_path / "g.safetensors")
    change_probe(path, spread)
    assert load_model(path, configs=sd2).schedule.prediction == guess
    for asked in ("epsilon", "v"):
        assert load_model(path, configs=sd2, prediction=asked).schedule.prediction == asked


# Memory

MEASURE = """
import re, sys
from pathlib import Path
import torch
from lora_diffusion.models.load import load_model

def memory(kind):  # getrusage would count the parent process too
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, configs = map(Path, sys.argv[1:])
load_model(small, configs=small.parent)  # imports, and what the first load keeps
before = memory("VmRSS")
model = load_model(large, configs=configs, dtype=torch.float16)
print(sum(p.numel() * p.element_size() for p in model.parameters()), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Stored in float32 and kept in float16: neither the file nor a second copy may stay in memory."""
    small = make_tiny_sd1(tmp_path / "small")
    large = make_tiny_sd1(tmp_path / "large", widths=(256, 512, 512, 512))
    files = [make_single_file(folder, folder / "all.safetensors") for folder in (small, large)]
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (*files, large))],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    weights, growth = map(int, output.split())
    assert weights > 80 * 2**20
    largest = 4 * 1024 * 512 * 9 * 4  # a float32 convolution as read, and its copies while it is cast
    assert 0.9 * weights < growth < 1.1 * weights + largest
