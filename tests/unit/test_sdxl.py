"""The SDXL model: two encoders, pooled text, sizes, and names in files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.formats.names import canonical_name
from lora_diffusion.models.base import Conditioning, ModelError, size_numbers
from lora_diffusion.models.load import load_model
from lora_diffusion.models.sdxl import SDXL
from tests.tiny import make_tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def model(folder: Path) -> SDXL:
    model = load_model(folder)
    assert isinstance(model, SDXL)
    return model


def layers_of(module: nn.Module) -> list[str]:
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize(
    ("part", "path", "name"),
    [
        ("unet", "down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("unet", "down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("text_encoder", "encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_names_in_files_are_kohyas(model: SDXL, part: str, path: str, name: str) -> None:
    assert model.parts[part].file_name(path) == name


def test_the_projection_of_the_second_encoder_is_no_target(model: SDXL) -> None:
    layers = select_layers(model.text_encoder_2, "full")
    assert len(layers) == 3 * 6
    assert not any("text_projection" in path for path in layers)


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_an_adapter_of_the_projection_finds_it(model: SDXL, tmp_path: Path, format: Literal["kohya", "peft"]) -> None:
    layer = model.text_encoder_2.text_projection
    parts = {"lora_down.weight": torch.ones(2, layer.in_features), "lora_up.weight": torch.ones(layer.out_features, 2)}
    file = AdapterFile({"lora_te2_text_projection": parts | {"alpha": torch.tensor(1.0)}}, family="sdxl")
    file.write(tmp_path / "a.safetensors", format=format)
    (match,) = AdapterFile.read(tmp_path / "a.safetensors").attach(model.parts).matches
    assert (match.part, match.path) == ("text_encoder_2", "text_projection")
    assert match.layer is layer


def test_a_folders_layers_are_those_that_an_adapter_of_the_model_finds(folder: Path, model: SDXL) -> None:
    layers = BaseWeights.open(folder).layers
    weight = model.text_encoder_2.text_projection.weight
    assert torch.equal(BaseWeights.open(folder).read("lora_te2_text_projection"), weight)
    names = {canonical_name(part.file_name(path)) for part in model.parts.values() for path in layers_of(part.module)}
    assert layers.keys() == names


def test_the_pooled_vector_is_that_of_the_first_chunk(model: SDXL) -> None:
    caption = "the red cat " * 40
    first, both = model.encode_text([caption], chunks=1), model.encode_text([caption], chunks=2)
    assert first.pooled is not None
    assert both.pooled is not None
    torch.testing.assert_close(both.pooled, first.pooled, atol=1e-6, rtol=1e-5)  # a batch sums in another order
    assert both.hidden.shape[1] == 2 * first.hidden.shape[1]


def test_clip_skip_1_and_2_are_the_layer_that_sdxl_was_trained_on(model: SDXL) -> None:
    assert torch.equal(model.encode_text(["cat"]).hidden, model.encode_text(["cat"], clip_skip=2).hidden)
    with pytest.raises(ModelError, match=r"clip_skip is 3, but SDXL .*leave clip_skip out"):
        model.encode_text(["cat"], clip_skip=3)


def test_the_id_of_the_text_encoding_covers_both_encoders(model: SDXL, tmp_path: Path) -> None:
    ids = {model.text_encoder_id}
    for index, part in enumerate(("text_encoder", "text_encoder_2")):
        folder = make_tiny_sdxl(tmp_path / str(index))
        path = folder / part / "model.safetensors"
        weights = load_file(path)
        weights["text_model.final_layer_norm.bias"] += 1
        save_file(weights, path)
        ids.add(load_model(folder).text_encoder_id)
    assert len(ids) == 3
    assert load_model(make_tiny_sdxl(tmp_path / "again")).text_encoder_id == model.text_encoder_id


def test_pooled_text_and_every_size_change_the_prediction(model: SDXL) -> None:
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = model.encode_text(["cat"])
    assert text.pooled is not None
    numbers = torch.tensor(size_numbers((800, 1200), (7, 11), (64, 96)), dtype=torch.float32)
    assert numbers.tolist() == [1200, 800, 11, 7, 96, 64]

    def predict(conditioning: Conditioning) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(noisy, torch.tensor([500]), conditioning)

    expected = predict(text.with_size(numbers))
    changed = [predict(replace(text, pooled=text.pooled + 1).with_size(numbers))]
    changed += [predict(text.with_size(numbers + 5 * torch.eye(6)[i])) for i in range(6)]
    assert all(not torch.allclose(other, expected, atol=1e-5) for other in changed)


def test_conditioning_carries_all_fields(model: SDXL) -> None:
    one = model.encode_text(["cat"]).with_size(torch.arange(6))
    two = model.encode_text(["a", "b"]).with_size(torch.full((2, 6), 1023))
    joined = Conditioning.cat([one, two]).to(dtype=torch.bfloat16)
    assert len(joined) == 3
    assert joined.pooled is not None
    assert joined.size is not None
    assert joined.pooled.dtype == torch.bfloat16
    assert joined.size.tolist() == [[0, 1, 2, 3, 4, 5], [1023] * 6, [1023] * 6], "sizes are not rounded"
