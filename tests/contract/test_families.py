"""What every model family must do, on a tiny random model of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.models.base import Conditioning, DiffusionModel, size_numbers
from lora_diffusion.models.families import FAMILIES
from lora_diffusion.models.load import detect_family, load_model
from tests.tiny import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl

TINY: dict[str, Callable[[Path], Path]] = {
    "sd1": make_tiny_sd1,
    "sd2": make_tiny_sd2,
    "sdxl": make_tiny_sdxl,
}


def test_every_family_has_a_tiny_model_and_there_is_one() -> None:
    assert TINY.keys() == FAMILIES.keys()
    assert FAMILIES


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder = TINY[request.param](tmp_path_factory.mktemp(request.param))
    assert detect_family(folder).family == request.param
    model = load_model(folder)
    assert model.family == request.param
    return model


def pixels(model: DiffusionModel, batch: int) -> torch.Tensor:
    width, height = model.default_size
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def conditioned(model: DiffusionModel, *captions: str) -> Conditioning:
    size = model.default_size
    return model.encode_text(captions).with_size(torch.tensor(size_numbers(size, (0, 0), size)))


def test_latents_have_the_promised_shape(model: DiffusionModel) -> None:
    mean, std = model.encode_image(pixels(model, 2))
    width, height = (side // model.latent_factor for side in model.default_size)
    assert mean.shape == std.shape == (2, model.latent_channels, height, width)
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all()


def test_decoding_gives_a_picture_of_the_encoded_size(model: DiffusionModel) -> None:
    mean, _ = model.encode_image(pixels(model, 1))
    decoded = model.decode_latents(mean)
    assert decoded.shape == pixels(model, 1).shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1


def test_decoding_undoes_the_scale_of_encoding(model: DiffusionModel) -> None:
    """The VAE decodes unscaled latents; ours are scaled."""
    mean, _ = model.encode_image(pixels(model, 1))
    with torch.no_grad():
        expected = model.vae.decode(model.vae.encode(pixels(model, 1)).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode_latents(mean), expected, atol=1e-4, rtol=0)  # scaling rounds


def test_text_conditioning_has_one_row_per_caption_and_whole_chunks(model: DiffusionModel) -> None:
    captions = ["a house", "", "the red cat " * 60]
    one, two = model.encode_text(captions), model.encode_text(captions, chunks=2)
    assert one.hidden.shape[:2] == (3, model.max_tokens + 2)
    assert two.hidden.shape == (3, 2 * one.hidden.shape[1], model.unet.config["cross_attention_dim"])
    assert model.count_tokens("") == 0


def test_prediction_has_the_shape_of_the_latents_and_depends_on_all_inputs(model: DiffusionModel) -> None:
    width, height = (side // model.latent_factor for side in model.default_size)
    noisy = torch.randn(2, model.latent_channels, height, width, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([10, 500])
    conditioning = conditioned(model, "a house", "the red cat")
    with torch.no_grad():
        prediction = model.predict(noisy, t, conditioning)
        assert prediction.shape == noisy.shape
        assert torch.isfinite(prediction).all()
        for changed in (
            model.predict(noisy * 0.5, t, conditioning),
            model.predict(noisy, t + 100, conditioning),
            model.predict(noisy, t, conditioned(model, "a boat", "a fish")),
        ):
            assert not torch.allclose(changed, prediction, atol=1e-5)


def test_smallest_size_of_the_resolution_step_can_be_predicted(model: DiffusionModel) -> None:
    side = model.resolution_step // model.latent_factor
    noisy = torch.zeros(1, model.latent_channels, side, 2 * side)
    with torch.no_grad():
        assert model.predict(noisy, torch.tensor([3]), conditioned(model, "")).shape == noisy.shape


def test_file_names_of_all_layers_of_all_parts_differ(model: DiffusionModel) -> None:
    layers = [(part, path) for part in model.parts.values() for path in select_layers(part.module, "full")]
    names = [part.file_name(path) for part, path in layers]
    assert len(names) == len(set(names)) > 100
    assert "unet" in model.parts
    assert all("." not in name and name.startswith("lora_") for name in names)


def test_ids_and_metadata_names_are_there(model: DiffusionModel) -> None:
    assert len(model.vae_id) == len(model.text_encoder_id) == 64
    assert model.vae_id != model.text_encoder_id
    assert model.base_model_version
    assert model.architecture
