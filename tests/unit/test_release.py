"""Parts of a model that leave memory and come back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from tests.tiny import make_tiny_sd1, make_tiny_sdxl


def loaded(folder: Path, family: str) -> DiffusionModel:
    return load_model((make_tiny_sdxl if family == "sdxl" else make_tiny_sd1)(folder / "base"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_released_parts_leave_memory_and_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    parts = {"vae", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert model.reloads.keys() == parts
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        text, image = model.encode_text(["a cat"]), model.encode_image(pixels)
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    vae_id, text_encoder_id = model.vae_id, model.text_encoder_id

    model.release(parts)
    gc.collect()
    for part in parts:
        assert sum(parameter.nbytes for parameter in model.get_submodule(part).parameters()) == 0
    assert sum(parameter.nbytes for parameter in model.unet.parameters()) > 0
    assert (model.latent_factor, model.default_size) == (4, (64, 64)), "settings can be read without the weights"

    with torch.no_grad():
        again = model.encode_text(["a cat"])
        assert torch.equal(again.hidden, text.hidden)
        assert sum(parameter.nbytes for parameter in model.vae.parameters()) == 0, "only what is needed comes back"
        assert all(map(torch.equal, model.encode_image(pixels), image))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
    for name in ("vae_id", "text_encoder_id"):
        del model.__dict__[name]
    assert (model.vae_id, model.text_encoder_id) == (vae_id, text_encoder_id)


def test_pictures_can_be_decoded_and_ids_computed_while_a_part_is_released(tmp_path: Path) -> None:
    model = loaded(tmp_path, "sd1")
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    expected, expected_id = model.decode_latents(latents), model.vae_id
    del model.__dict__["vae_id"]
    model.release(["vae"])
    model.release(["vae"])  # twice is once
    assert model.vae_id == expected_id
    model.release(["vae"])
    assert torch.equal(model.decode_latents(latents), expected)
