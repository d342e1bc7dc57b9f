"""The UNet put in order for GPUs computes what it did, and nothing in it turns a picture round any more."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.fused_layers import fuse_layers
from lora_diffusion.models.load import load_model
from tests.tiny import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl

MAKERS = {"sd1": make_tiny_sd1, "sd2": make_tiny_sd2, "sdxl": make_tiny_sdxl}


def make_unet(family: str, folder: Path) -> UNet2DConditionModel:
    """In float64, so that what differs is no rounding."""
    return load_model(MAKERS[family](folder / "base")).unet.double()


def predict(unet: UNet2DConditionModel, sample: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    width = unet.config["cross_attention_dim"]
    hidden = torch.randn((len(sample), 7, width), generator=generator).double()
    times = torch.tensor([7] * len(sample))
    added = None
    if unet.config["addition_embed_type"]:
        pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        added = {
            "text_embeds": torch.randn((len(sample), pooled), generator=generator).double(),
            "time_ids": torch.full((len(sample), 6), 64.0),
        }
    return unet(sample, times, encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def noise(unet: UNet2DConditionModel) -> Tensor:
    side = unet.config["sample_size"]
    return torch.randn((2, 4, side, side), generator=torch.Generator().manual_seed(1)).double().requires_grad_()


@pytest.mark.parametrize("family", MAKERS)
def test_predictions_gradients_and_names_are_as_before(family: str, tmp_path: Path) -> None:
    plain = make_unet(family, tmp_path)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    fuse_layers(fused)

    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert select_layers(fused, "full").keys() == select_layers(plain, "full").keys()
    sample = noise(plain)
    expected, made = predict(plain, sample), predict(fused, sample)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    # diffusers computes the time embedding in float32, the rest is float64 in another order.
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(output, sample, direction)[0] for output in (made, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", MAKERS)
def test_every_convolution_but_the_first_is_given_channels_last(family: str, tmp_path: Path) -> None:
    unet = make_unet(family, tmp_path)
    fuse_layers(unet)
    turned: list[str] = []

    def look(path: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            if not x.is_contiguous(memory_format=torch.channels_last):
                turned.append(path)

        unet.get_submodule(path).register_forward_pre_hook(hook)

    for path, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            look(path)
    with torch.no_grad():
        predict(unet, noise(unet))
    assert turned == ["conv_in"]


def test_another_activation_is_refused(tmp_path: Path) -> None:
    unet = make_unet("sd1", tmp_path)
    unet.conv_act = nn.GELU()
    with pytest.raises(ModelError, match="GELU"):
        fuse_layers(unet)
