"""A VAE that overflows in half precision: the pictures that do are computed again, the others are left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from tests.tiny import make_tiny_sd1

WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")
HALF_STEPS = 0.02
"""What float16 rounding may change in latents of unit size; measured 0.003."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its encoder's and decoder's first layers multiply by so much that bright pictures pass 65504 in float16."""
    folder = make_tiny_sd1(tmp_path_factory.mktemp("hot"))
    weights = load_file(folder / WEIGHTS)
    for name in ("encoder.conv_in", "decoder.conv_in"):
        weights[f"{name}.weight"] *= 3e4
    save_file(weights, folder / WEIGHTS)
    return folder


def load(folder: Path, vae_dtype: torch.dtype) -> DiffusionModel:
    return load_model(folder, vae_dtype=vae_dtype)


def pictures() -> torch.Tensor:
    """(3, 3, 64, 64): the second overflows, the others do not."""
    noise = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise * torch.tensor([0.02, 1.0, 0.02]).reshape(3, 1, 1, 1)


def test_only_pictures_that_overflow_are_computed_in_float32(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    half, full = load(folder, torch.float16), load(folder, torch.float32)
    raw = half.vae.encode(pictures().half()).latent_dist.parameters
    assert [bool(row.isfinite().all()) for row in raw] == [True, False, True], "the test needs one that overflows"
    with caplog.at_level(logging.INFO):
        mean, std = half.encode_image(pictures())
        half.encode_image(pictures())
    assert [record.getMessage() for record in caplog.records] == [
        "the VAE overflows in float16; pictures that do are computed in float32"
    ]
    expected_mean, expected_std = full.encode_image(pictures())
    assert mean.isfinite().all()
    assert std.isfinite().all()
    torch.testing.assert_close(mean, expected_mean, atol=HALF_STEPS, rtol=HALF_STEPS)
    torch.testing.assert_close(std, expected_std, atol=HALF_STEPS, rtol=HALF_STEPS)
    assert torch.equal(mean[0], half.encode_image(pictures()[[0, 2]])[0][0]), "its neighbours change nothing"
    assert {parameter.dtype for parameter in half.vae.parameters()} == {torch.float16}


def test_decoding_is_checked_in_the_same_way(folder: Path) -> None:
    half, full = load(folder, torch.float16), load(folder, torch.float32)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.18215
    assert not half.vae.decode((latents / 0.18215).half()).sample.isfinite().all()
    decoded = half.decode_latents(latents)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, full.decode_latents(latents), atol=HALF_STEPS, rtol=0)


def test_what_even_float32_cannot_hold_is_not_made_to_look_whole(tmp_path: Path) -> None:
    model = load(make_tiny_sd1(tmp_path), torch.float16)
    pixels = pictures()
    pixels[1, 0, 0, 0] = torch.inf
    mean, _ = model.encode_image(pixels)
    assert [bool(row.isfinite().all()) for row in mean] == [True, False, True]
    latents = torch.zeros(2, 4, 16, 16)
    latents[0, 0, 0, 0] = torch.inf
    assert [bool(row.isfinite().all()) for row in model.decode_latents(latents)] == [False, True]


def test_cached_latents_of_half_and_full_precision_are_kept_apart(folder: Path) -> None:
    half, full = load(folder, torch.float16), load(folder, torch.float32)
    before = half.vae_id
    half.encode_image(pictures())
    assert before != full.vae_id
    assert load(folder, torch.float16).vae_id == before


def test_the_engine_draws_with_a_vae_that_overflows(folder: Path) -> None:
    request = Request("the red cat", seed=1, steps=2, sampler="ddim")
    half = Engine(load(folder, torch.float16)).generate([request])[0]
    full = Engine(load(folder, torch.float32)).generate([request])[0]
    differences = torch.tensor(list(half.tobytes())).float() - torch.tensor(list(full.tobytes())).float()
    assert differences.abs().mean() < 1
