"""The SD 2.x model: padding, names and what files call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion.models import clip
from lora_diffusion.models.load import load_model
from lora_diffusion.models.sd2 import SD2
from tests.tiny import make_tiny_sd2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SD2:
    model = load_model(make_tiny_sd2(tmp_path_factory.mktemp("sd2")))
    assert isinstance(model, SD2)
    return model


def test_captions_are_padded_with_token_0_as_the_tokenizers_config_says(model: SD2) -> None:
    ids = clip.tokenize(model.tokenizer, ["cat"], length=75, chunks=2)
    end = model.tokenizer.eos_token_id
    assert ids[0, 0].tolist()[2:4] == [end, 0]
    assert ids[0, 0].tolist().count(0) == 74
    assert ids[0, 1].tolist() == [model.tokenizer.bos_token_id, end] + [0] * 75


@pytest.mark.parametrize(
    ("prediction", "version", "architecture"),
    [("epsilon", "sd_v2", "stable-diffusion-v2-512"), ("v", "sd_v2_v", "stable-diffusion-v2-768-v")],
)
def test_prediction_decides_what_files_call_the_base(
    tmp_path: Path, prediction: str, version: str, architecture: str
) -> None:
    model = load_model(make_tiny_sd2(tmp_path, prediction=prediction))
    assert (model.base_model_version, model.architecture) == (version, architecture)


def test_file_names_are_those_of_diffusers(model: SD2) -> None:
    part = model.parts["unet"]
    assert part.file_name("down_blocks.1.attentions.0.proj_in") == "lora_unet_down_blocks_1_attentions_0_proj_in"
