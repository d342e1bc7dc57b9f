"""The configs for single-file checkpoints are those of the published models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from lora_diffusion.ldm_names import Place, place_in_single_file
from lora_diffusion.models.builtin_configs import builtin_configs
from lora_diffusion.models.components import PARTS, empty_module
from tests import true_models

VERSIONS = {"sd1": ("sd1", "epsilon"), "sd2": ("sd2", "epsilon"), "sd2-v": ("sd2", "v_prediction")}
VERSIONS |= {"sdxl": ("sdxl", "epsilon")}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_models_have_the_size_of_the_published_ones() -> None:
    assert count(true_models.make_unet("sd1")) == 859_520_964
    assert count(true_models.make_unet("sd2")) == 865_910_724
    assert count(true_models.make_unet("sdxl")) == 2_567_463_684
    assert count(true_models.make_vae()) == 83_653_863
    assert count(true_models.make_text_encoder("sd2")) == 340_387_840
    assert count(true_models.make_text_encoder("sdxl", "text_encoder_2")) == 694_659_840


@pytest.mark.parametrize("version", VERSIONS)
def test_builtin_configs_are_those_numbers(version: str) -> None:
    configs = builtin_configs(*VERSIONS[version])
    expected = {"unet": true_models.UNETS[version], "vae": true_models.VAE, **true_models.TEXT_ENCODERS[version]}
    assert configs.keys() == expected.keys() | {"scheduler"}
    for part, numbers in expected.items():
        module = empty_module(part, configs[part])
        assert {name: comparable(module.config, name) for name in numbers} == tuples_as_lists(numbers)
    assert configs["vae"]["scaling_factor"] == true_models.LATENT_SCALES[version]


def comparable(config: Any, name: str) -> Any:
    value = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return list(value) if isinstance(value, list | tuple) else value


def tuples_as_lists(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


@pytest.mark.parametrize(("version", "expected"), [("sd1", 1130), ("sd2", 1306), ("sdxl", 2641)])
def test_every_tensor_of_the_published_models_has_a_place_of_its_own_in_a_file(version: str, expected: int) -> None:
    family, prediction = VERSIONS[version]
    configs = builtin_configs(family, prediction)
    places: list[Place] = []
    for part in PARTS[family]:
        module = empty_module(part, configs[part])
        plain = [i for i, kind in enumerate(configs["unet"]["up_block_types"]) if kind == "UpBlock2D"]
        places += [place_in_single_file(family, part, name, plain_up_blocks=plain) for name in module.state_dict()]
    assert len(places) == len(set(places)) == expected
