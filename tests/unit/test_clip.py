"""Captions to hidden states: the same as diffusers' pipeline, and longer where it would cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from lora_diffusion.models import clip
from lora_diffusion.models.base import ModelError
from lora_diffusion.models.load import load_model
from lora_diffusion.models.sd1 import SD1
from tests.tiny import make_tiny_sd1

CAPTIONS = ["the red cat in the house", "", "ein grünes Haus, 🦊 & more", "the red cat, " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd1(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(folder: Path) -> SD1:
    model = load_model(folder)
    assert isinstance(model, SD1)
    return model


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if not hasattr(
        pipeline.text_encoder, "text_model"
    ):  # diffusers 0.42 still asks for the level transformers 5 dropped
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


def test_token_ids_are_those_of_the_stock_tokenizer(model: SD1) -> None:
    ours = clip.tokenize(model.tokenizer, CAPTIONS, length=75, chunks=1)
    theirs = model.tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert ours.shape == (4, 1, 77)
    assert torch.equal(ours[:, 0], theirs.input_ids)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_hidden_states_are_bit_for_bit_those_of_the_stock_pipeline(
    model: SD1, stock: StableDiffusionPipeline, clip_skip: int
) -> None:
    """Diffusers counts the layers left out: its None is our 1, its 1 our 2."""
    skipped = None if clip_skip == 1 else clip_skip - 1
    theirs, _ = stock.encode_prompt(CAPTIONS, torch.device("cpu"), 1, False, clip_skip=skipped)
    with torch.no_grad():
        ours = model.encode_text(CAPTIONS, clip_skip=clip_skip).hidden
    assert torch.equal(ours, theirs)


def test_clip_skip_changes_the_hidden_states(model: SD1) -> None:
    assert not torch.equal(
        model.encode_text(["cat"], clip_skip=1).hidden, model.encode_text(["cat"], clip_skip=2).hidden
    )


@pytest.mark.parametrize("clip_skip", [0, 3])
def test_clip_skip_beyond_the_layers_is_refused(model: SD1, clip_skip: int) -> None:
    with pytest.raises(ModelError, match=f"clip_skip is {clip_skip}, .* 2 layers"):
        model.encode_text(["cat"], clip_skip=clip_skip)


def test_each_chunk_is_encoded_like_a_caption_of_its_own(model: SD1) -> None:
    pieces = ["the " * 75, "red " * 75, "cat " * 10]
    long = model.encode_text(["".join(pieces)], chunks=3).hidden
    assert long.shape == (1, 231, 32)
    assert torch.equal(long[0].reshape(3, 77, 32), model.encode_text(pieces).hidden)


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunks_none_is_as_many_as_the_longest_caption_needs(model: SD1, num_tokens: int, expected: int) -> None:
    captions = ["the " * num_tokens, "cat"]
    assert model.encode_text(captions, chunks=None).hidden.shape == (2, 77 * expected, 32)


def test_token_count_leaves_out_the_begin_and_end_marks(model: SD1) -> None:
    assert model.count_tokens("") == 0
    assert model.count_tokens("the red cat") == 3
    assert model.count_tokens("the " * 500) == 500
    assert model.max_tokens == 75


def test_unused_chunks_are_empty_captions(model: SD1) -> None:
    padded = model.encode_text(["cat"], chunks=2).hidden[0]
    assert torch.equal(padded.reshape(2, 77, 32), model.encode_text(["cat", ""]).hidden)
