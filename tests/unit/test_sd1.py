"""The SD 1.x model: parity with its parts, its schedule, its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from lora_diffusion.adapters.inject import inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.errors import UserError
from lora_diffusion.models.base import Conditioning
from lora_diffusion.models.load import load_model
from lora_diffusion.models.sd1 import SD1
from tests.tiny import make_tiny_sd1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd1(tmp_path_factory.mktemp("sd1"))


def load(folder: Path, **options: Any) -> SD1:
    model = load_model(folder, **options)
    assert isinstance(model, SD1)
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_is_that_of_the_diffusers_scheduler(folder: Path, zero_terminal_snr: bool) -> None:
    model = load(folder, zero_terminal_snr=zero_terminal_snr)
    theirs = DDIMScheduler.from_config(model.scheduler_config)
    assert theirs.config["rescale_betas_zero_snr"] == zero_terminal_snr
    torch.testing.assert_close(model.schedule.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "asked", "resolved", "version"),
    [
        *(("epsilon", "auto", "epsilon", "sd_v1"), ("v", "auto", "v", "sd_v1_v"), ("v", "v", "v", "sd_v1_v")),
        *((None, "auto", "epsilon", "sd_v1"), (None, "v", "v", "sd_v1_v")),
    ],
)
def test_prediction_is_the_stored_one_and_where_none_is_the_one_asked_for(
    tmp_path: Path, stored: str | None, asked: str, resolved: str, version: str
) -> None:
    model = load(make_tiny_sd1(tmp_path, prediction=stored), prediction=asked)
    assert model.schedule.prediction == resolved
    assert model.base_model_version == version
    assert model.scheduler_config["prediction_type"] == {"epsilon": "epsilon", "v": "v_prediction"}[resolved]


def test_zero_terminal_snr_is_read_from_the_folder(tmp_path: Path) -> None:
    assert load(make_tiny_sd1(tmp_path, zero_terminal_snr=True)).schedule.alphas_cumprod[-1] == 0


def test_a_prediction_type_we_do_not_train_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prediction_type 'sample'"):
        load(make_tiny_sd1(tmp_path, prediction="sample"))


@pytest.mark.parametrize(("factor", "step"), [(4, 32), (8, 64)])
def test_sizes_follow_from_the_configs(tmp_path: Path, factor: int, step: int) -> None:
    model = load(make_tiny_sd1(tmp_path, latent_factor=factor))
    assert (model.latent_factor, model.resolution_step, model.default_size) == (factor, step, (64, 64))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "auto"])
def test_attention_choice_does_not_change_the_prediction(folder: Path, attention: Any) -> None:
    reference = load(folder, attention="eager")
    model = load(folder, attention=attention)
    # 32 x 32 latents: long enough that "auto" uses fused attention in the first level and plain attention below it
    x, t = noise(2, 4, 32, 32), torch.tensor([10, 900])
    conditioning = model.encode_text(["the red cat", "a house"])
    with torch.no_grad():
        ours, expected = model.predict(x, t, conditioning), reference.predict(x, t, conditioning)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)  # sums in another order


def test_xformers_without_it_is_an_error_that_says_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError, match=r"xformers.*model.attention = 'auto'"):
        load(folder, attention="xformers")


def test_prediction_comes_in_the_dtype_of_the_latents_whatever_the_unets(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    conditioning = model.encode_text(["cat"])
    assert conditioning.hidden.dtype == torch.bfloat16
    assert model.predict(noise(1, 4, 16, 16), torch.tensor([5]), conditioning).dtype == torch.float32


def test_latents_of_a_picture_have_the_scale_of_the_config(folder: Path) -> None:
    model = load(folder)
    pixels = noise(1, 3, 64, 64).clamp(-1, 1)
    mean, std = model.encode_image(pixels)
    posterior = model.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean * 0.18215)
    assert torch.equal(std, posterior.std * 0.18215)


def test_file_names_are_those_of_diffusers(folder: Path) -> None:
    parts = load(folder).parts
    name = parts["unet"].file_name("down_blocks.1.attentions.0.proj_in")
    assert name == "lora_unet_down_blocks_1_attentions_0_proj_in"
    name = parts["text_encoder"].file_name("encoder.layers.0.mlp.fc1")
    assert name == "lora_te_text_model_encoder_layers_0_mlp_fc1"


def test_ids_tell_models_apart_and_know_the_dtype(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_diffusion.models.load.has_fast_bf16", lambda: False)  # the VAE stays float32
    model, again, other = load(folder), load(folder), load(make_tiny_sd1(tmp_path, seed=1))
    half = load(folder, dtype=torch.bfloat16)
    assert (model.vae_id, model.text_encoder_id) == (again.vae_id, again.text_encoder_id)
    assert model.vae_id != other.vae_id
    assert model.text_encoder_id != other.text_encoder_id
    assert (half.vae_id == model.vae_id, half.text_encoder_id == model.text_encoder_id) == (True, False)


def test_ids_do_not_change_when_adapters_are_injected(folder: Path) -> None:
    plain, adapted = load(folder), load(folder)
    layers = select_layers(adapted.text_encoder, "attention")
    inject(adapted.text_encoder, layers, lambda _, layer: LoRA(layer, 2, 2.0))
    assert adapted.text_encoder_id == plain.text_encoder_id


def test_gradients_reach_adapters_in_unet_and_text_encoder(folder: Path) -> None:
    model = load(folder)
    adapters = [
        adapter
        for part in model.parts.values()
        for adapter in inject(
            part.module, select_layers(part.module, "attention"), lambda _, layer: LoRA(layer, 2, 2.0)
        ).values()
    ]
    model.predict(noise(1, 4, 16, 16), torch.tensor([5]), model.encode_text(["cat"])).sum().backward()
    assert len(adapters) == 80 + 8
    assert all(adapter.lora_up.weight.grad is not None for adapter in adapters if isinstance(adapter, LoRA))


def test_conditionings_join_to_one_batch() -> None:
    first, second = Conditioning(torch.zeros(1, 77, 8)), Conditioning(torch.ones(2, 77, 8))
    joined = Conditioning.cat([first, second]).to(dtype=torch.float16)
    assert len(joined) == 3
    assert joined.hidden.dtype == torch.float16
    assert joined.pooled is None
