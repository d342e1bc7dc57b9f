"""What the target names select in the real Stable Diffusion 1.5, not in a miniature of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from lora_diffusion.adapters.inject import eject, inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from tests.sd15 import make_text_encoder, make_unet


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return make_unet()


@pytest.fixture(scope="module")
def text_encoder() -> nn.Module:
    return make_text_encoder()


def count(root: nn.Module) -> int:
    return sum(parameter.numel() for parameter in root.parameters())


def test_the_models_have_the_size_of_the_published_ones(unet: nn.Module, text_encoder: nn.Module) -> None:
    assert count(unet) == 859_520_964
    assert count(text_encoder) == 123_060_480


@pytest.mark.parametrize(("targets", "expected"), [("attention", 128), ("attention-mlp", 192), ("full", 278)])
def test_unet_layers_of_each_target(unet: nn.Module, targets: str, expected: int) -> None:
    assert len(select_layers(unet, targets)) == expected


@pytest.mark.parametrize(("targets", "expected"), [("attention", 48), ("attention-mlp", 72), ("full", 72)])
def test_text_encoder_layers_of_each_target(text_encoder: nn.Module, targets: str, expected: int) -> None:
    assert len(select_layers(text_encoder, targets)) == expected


def test_full_is_every_unet_layer_but_the_first_the_last_and_the_time_embedding(unet: nn.Module) -> None:
    layers = {path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    left_out = layers - select_layers(unet, "full").keys()
    assert left_out == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_convolution_targets_by_kind(unet: nn.Module) -> None:
    """22 residual blocks; a shortcut where the width changes: 2 on the way down, all 12 on the way up."""
    added = select_layers(unet, "full").keys() - select_layers(unet, "attention-mlp").keys()
    assert Counter(path.rsplit(".", 1)[-1] for path in added) == {
        "conv1": 22,
        "conv2": 22,
        "time_emb_proj": 22,
        "conv_shortcut": 14,
        "conv": 6,
    }


def test_rank_16_attention_adapter_has_3_2_million_parameters(unet: nn.Module) -> None:
    before = str(unet)
    adapters = inject(unet, select_layers(unet, "attention"), lambda _, layer: LoRA(layer, 16, 16.0))
    trained = sum(p.numel() for a in adapters.values() for p in a.parameters() if p.requires_grad)
    assert trained == 3_188_736
    assert {p.device for a in adapters.values() for p in a.parameters()} == {torch.device("meta")}
    eject(unet, adapters)
    assert str(unet) == before
