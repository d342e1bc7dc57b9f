from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion.adapters.inject import eject, inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.generation.engine import Cancelled, Engine, Request
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from tests.random_adapters import random_adapter, written
from tests.tiny import make_tiny_sd1

ROUNDING = 1
"""Matrix products of another batch size may round differently: at most one level of 255."""

SHIPPED = Path(__file__).parents[2] / "samples" / "base"

REQUEST = Request("a cat", "blurry", seed=1, steps=2, cfg=5.0, size=(32, 32))
INK = replace(REQUEST, adapters={"ink": 1.0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_tiny_sd1(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def files(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFile]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        "ink": random_adapter(model, seed=1, targets="full"),
        "neon": random_adapter(model, seed=2, parts=("unet", "text_encoder")),
        "words": random_adapter(model, seed=3, parts=("text_encoder",), size=4.0),
    }
    return {name: written(file, folder / f"{name}.safetensors") for name, file in made.items()}


@pytest.fixture
def engine(model: DiffusionModel, files: dict[str, AdapterFile]) -> Iterator[Engine]:
    """With all three adapters loaded; the model is shared, so they are unloaded at the end."""
    engine = Engine(model)
    for name, file in files.items():
        engine.load_adapter(name, file)
    yield engine
    for name in engine.adapters:
        engine.unload_adapter(name)


def draw(engine: Engine, *requests: Request) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in engine.generate(requests)]


def draw_one(engine: Engine, request: Request) -> np.ndarray:
    return draw(engine, request)[0]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


def hash_of(model: DiffusionModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def poisoned_global_random() -> Iterator[None]:
    """Fails if anything draws from torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before), "torch's global generator was drawn from"


# One request


def test_pictures_have_the_size_asked_for_and_the_models_own_by_default(engine: Engine) -> None:
    sizes = [image.size for image in engine.generate([replace(REQUEST, size=(96, 32)), replace(REQUEST, size=None)])]
    assert sizes == [(96, 32), (64, 64)]


def test_seed_prompt_negative_and_guidance_each_change_the_picture(engine: Engine) -> None:
    base = draw_one(engine, REQUEST)
    changed = [{"seed": 2}, {"prompt": "the red house"}, {"negative": "a cat"}, {"cfg": 2.0}, {"clip_skip": 2}]
    for change in changed:
        assert difference(base, draw_one(engine, replace(REQUEST, **change))) > ROUNDING, change


def test_a_prompt_beyond_75_tokens_is_not_cut(engine: Engine) -> None:
    long = replace(REQUEST, prompt="a cat " * 60)
    assert difference(draw_one(engine, long), draw_one(engine, replace(long, prompt=long.prompt + "red"))) > ROUNDING


def test_without_guidance_the_unconditional_pass_is_skipped_and_the_negative_prompt_has_no_effect(
    engine: Engine,
) -> None:
    rows: list[int] = []
    hook = engine.model.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    plain = draw_one(engine, replace(REQUEST, cfg=1.0))
    other = draw_one(engine, replace(REQUEST, cfg=1.0, negative="the red house"))
    draw_one(engine, REQUEST)
    hook.remove()
    assert rows == [1, 1, 1, 1, 2, 2]
    assert np.array_equal(plain, other)


def test_every_unet_evaluation_is_reported(engine: Engine) -> None:
    calls: list[tuple[int, int]] = []
    engine.generate([REQUEST, replace(REQUEST, steps=3)], on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_no_requests_give_no_pictures(engine: Engine) -> None:
    assert engine.generate([]) == []


# Batches


def test_pictures_in_a_batch_of_different_adapters_equal_those_drawn_alone(engine: Engine) -> None:
    requests = [
        REQUEST,
        INK,
        replace(REQUEST, adapters={"neon": 0.7}, prompt="the red house"),
        replace(REQUEST, adapters={"ink": -0.5, "neon": 0.5, "words": 1.0}, seed=9),
        replace(REQUEST, adapters={"words": 1.0}, negative="in the house"),
        replace(REQUEST, prompt="a cat " * 60, adapters={"words": 1.0}),
        replace(REQUEST, cfg=1.0, adapters={"neon": 1.0}),
        replace(INK, sampler="euler-a", seed=4),
        replace(REQUEST, sampler="euler-a"),
    ]
    together = draw(engine, *requests)
    for request, image in zip(requests, together, strict=True):
        assert difference(image, draw_one(engine, request)) <= ROUNDING, request
    assert min(difference(a, b) for i, a in enumerate(together) for b in together[:i]) > ROUNDING


def test_a_small_batch_size_draws_the_same_pictures_in_the_same_order(engine: Engine) -> None:
    requests = [replace(INK, seed=seed, steps=1 + seed % 2) for seed in range(5)]
    for image, expected in zip(
        draw(Engine(engine.model, batch_size=2), *[replace(r, adapters={}) for r in requests]),
        draw(engine, *[replace(r, adapters={}) for r in requests]),
        strict=True,
    ):
        assert difference(image, expected) <= ROUNDING


# Adapters


def test_strength_0_is_the_base_bit_for_bit(engine: Engine) -> None:
    base = draw_one(engine, REQUEST)
    assert np.array_equal(base, draw_one(engine, replace(REQUEST, adapters=dict.fromkeys(engine.adapters, 0.0))))
    assert difference(base, draw_one(engine, INK)) > 10


def test_the_tokens_of_a_text_are_counted_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    count = engine.model.count_tokens
    monkeypatch.setattr(engine.model, "count_tokens", lambda text: counted.append(text) or count(text))
    keys = {engine.batch_key(Request("a (cat:1.2)", "blurry", seed=seed, cfg=5.0)) for seed in range(9)}
    assert len(keys) == 1
    assert sorted(counted) == ["a  cat", "blurry"]


def test_half_the_strength_lies_between(engine: Engine) -> None:
    base, half, full = draw(engine, REQUEST, replace(REQUEST, adapters={"ink": 0.5}), INK)
    whole = np.abs(full - base).mean()
    assert 0.1 * whole < np.abs(half - base).mean() < whole
    assert np.abs(full - half).mean() < whole


def test_two_adapters_add_their_weight_changes(model: DiffusionModel, files: dict[str, AdapterFile]) -> None:
    engine = Engine(model)
    engine.load_adapter("ink", files["ink"])
    engine.load_adapter("neon", files["neon"])
    stacked = draw_one(engine, replace(REQUEST, adapters={"ink": 0.7, "neon": -0.3}))
    engine.unload_adapter("ink")
    engine.unload_adapter("neon")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, strength in (("ink", 0.7), ("neon", -0.3)):
        for match in files[name].attach(model.parts).matches:
            adapter = LoRA.from_tensors(match.layer, match.tensors)
            match.layer.weight.data += strength * adapter.delta().detach()
    merged = draw_one(engine, REQUEST)
    model.load_state_dict(before)
    assert difference(stacked, merged) <= ROUNDING


def test_an_adapter_of_the_text_encoder_changes_the_encoding_of_both_prompts(engine: Engine) -> None:
    words = replace(REQUEST, adapters={"words": 1.0})
    assert difference(draw_one(engine, REQUEST), draw_one(engine, words)) > ROUNDING
    assert difference(draw_one(engine, words), draw_one(engine, replace(words, negative="the house"))) > ROUNDING


def test_a_tag_in_the_prompt_is_the_same_as_an_entry_of_the_map(engine: Engine) -> None:
    tagged = replace(REQUEST, prompt="a cat <lora:ink:0.8>", adapters={"ink": 0.1})
    assert np.array_equal(draw_one(engine, tagged), draw_one(engine, replace(REQUEST, adapters={"ink": 0.8})))


def test_after_unloading_model_and_picture_are_bit_for_bit_as_before(
    model: DiffusionModel, files: dict[str, AdapterFile]
) -> None:
    engine = Engine(model)
    weights, picture = hash_of(model), draw_one(engine, REQUEST)
    for name in ("ink", "neon"):
        engine.load_adapter(name, files[name])
    assert np.array_equal(picture, draw_one(engine, REQUEST)), "an adapter that no request names changes nothing"
    ink = draw_one(engine, INK)
    engine.unload_adapter("neon")
    assert np.array_equal(ink, draw_one(engine, INK)), "one adapter goes, the other stays"
    engine.unload_adapter("ink")
    assert hash_of(model) == weights
    assert np.array_equal(picture, draw_one(engine, REQUEST))


def test_an_adapter_loaded_again_draws_the_same_picture(model: DiffusionModel, files: dict[str, AdapterFile]) -> None:
    engine = Engine(model)
    pictures = []
    for _ in range(2):
        engine.load_adapter("ink", files["ink"])
        pictures.append(draw_one(engine, INK))
        engine.unload_adapter("ink")
    assert np.array_equal(*pictures)


# Prompt weights


def test_weights_of_1_and_escaped_brackets_are_the_plain_prompt_bit_for_bit(engine: Engine) -> None:
    plain = draw_one(engine, replace(REQUEST, prompt="a cat"))
    assert np.array_equal(plain, draw_one(engine, replace(REQUEST, prompt="a (cat:1.0)")))
    encoded = engine.model.encode_text(["a (red) cat"], chunks=1).hidden
    found = engine._encode_one(r"a \(red\) cat", REQUEST, 1).hidden
    assert torch.equal(found, encoded)


def test_a_weighted_token_is_scaled_and_the_mean_restored(engine: Engine) -> None:
    plain = engine.model.encode_text(["a red cat"], chunks=1).hidden
    found = engine._encode_one("a (red:1.5) cat", REQUEST, 1).hidden
    expected = plain.clone()
    expected[:, 2] *= 1.5  # after the begin mark and "a"; "red" is one token of the tiny vocabulary
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(found, expected)  # the same operations in float32


def test_weights_reach_tokens_of_later_chunks(engine: Engine) -> None:
    text = "cat " * 80
    plain = engine.model.encode_text([text + "red"], chunks=2).hidden
    found = engine._encode_one(text + "(red:2)", REQUEST, 2).hidden
    torch.testing.assert_close(found[:, :77], plain[:, :77])
    changed = (found[0, 77:] / plain[0, 77:]).median(-1).values
    assert changed.argmax() == 1 + 80 - 75


def test_a_heavier_word_changes_the_picture_more(engine: Engine) -> None:
    plain, light, heavy = draw(engine, *[replace(REQUEST, prompt=f"a (cat:{w})") for w in (1.0, 1.2, 2.0)])
    assert 0 < np.abs(light - plain).mean() < np.abs(heavy - plain).mean()


# Previews


@pytest.mark.parametrize("sampler", ["ddim", "euler-a", "dpm++2m-karras"])
def test_a_preview_shows_what_the_picture_becomes(sampler: str) -> None:
    engine = Engine(load_model(SHIPPED))
    shown: list[Image.Image] = []
    request = Request("a photo of a red house", seed=3, steps=6, sampler=sampler)
    picture = engine.generate([request], on_preview=lambda _, draw: shown.append(draw()))[0]
    assert len(shown) == 6
    small = picture.resize(shown[0].size, Image.Resampling.BOX)
    last = np.corrcoef(np.asarray(small).ravel(), np.asarray(shown[-1]).ravel())[0, 1]
    first = np.corrcoef(np.asarray(small).ravel(), np.asarray(shown[0]).ravel())[0, 1]
    assert last > 0.8
    assert first > 0.4, "from the first step on it is no noise"


def test_previews_change_no_picture(engine: Engine) -> None:
    plain = engine.generate([REQUEST, INK])
    watched = engine.generate([REQUEST, INK], on_preview=lambda _, draw: draw())
    assert all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))


# What it leaves behind


def test_a_cancelled_drawing_leaves_the_engine_ready_for_the_next(engine: Engine) -> None:
    expected = draw_one(engine, REQUEST)

    def cancel(done: int, _total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.generate([INK, replace(REQUEST, seed=7)], on_step=cancel)
    assert np.array_equal(draw_one(engine, REQUEST), expected)


def test_no_global_generator_is_drawn_from_and_none_matters(engine: Engine) -> None:
    requests = [replace(INK, sampler=sampler) for sampler in ("ddim", "euler-a", "dpm++2m")]
    with poisoned_global_random():
        first = draw(engine, *requests)
    torch.rand(7)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw(engine, *requests), strict=True))


def test_a_model_in_training_is_drawn_without_dropout_and_stays_in_training(model: DiffusionModel) -> None:
    base = draw_one(Engine(model), REQUEST)
    adapters = inject(
        model.unet, select_layers(model.unet, "attention"), lambda _, layer: LoRA(layer, rank=2, alpha=2.0)
    )
    for adapter in adapters.values():
        torch.nn.init.constant_(adapter.lora_up.weight, 0.05)
    evaluated = draw_one(Engine(model), REQUEST)
    dropouts = [module for module in model.unet.modules() if isinstance(module, torch.nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 0.9
    model.unet.train()
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = draw_one(Engine(model), REQUEST)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    model.unet.eval()
    for dropout in dropouts:
        dropout.p = 0.0
    eject(model.unet, adapters)
    assert dropouts
    assert np.array_equal(trained, evaluated)
    assert difference(trained, base) > ROUNDING, "the live adapters are seen"


def test_an_adapter_cannot_be_loaded_over_one_in_training(model: DiffusionModel, files: dict[str, AdapterFile]) -> None:
    adapters = inject(
        model.unet, select_layers(model.unet, "attention"), lambda _, layer: LoRA(layer, rank=2, alpha=2.0)
    )
    engine = Engine(model)
    try:
        with pytest.raises(UserError, match="in training"):
            engine.load_adapter("ink", files["ink"])
    finally:
        eject(model.unet, adapters)
    assert engine.adapters == ()


# What it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (40, 32)}, r"40x32: .*multiples of 32 px. Use 32x32 or 64x32"),
        ({"size": (0, -5)}, r"0x-5.*Use 32x32"),
        ({"sampler": "eular"}, "mean 'euler'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 999}, "from 1 to 998"),
        ({"cfg": 0.5}, r"cfg is 0\.5"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"clip_skip": 0}, "clip_skip is 0"),
        ({"clip_skip": 9}, "clip_skip is 9"),
        ({"adapters": {"inks": 1.0}}, "mean 'ink'.*Loaded: ink, neon, words"),
        ({"adapters": {"ink": float("inf")}}, "strength of adapter 'ink' is inf"),
        ({"prompt": "a <lora:neun:1>"}, "mean 'neon'"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_drawn(
    engine: Engine, change: dict[str, object], message: str
) -> None:
    calls: list[int] = []
    with pytest.raises(UserError, match=message):
        engine.generate([REQUEST, replace(REQUEST, **change)], on_step=lambda done, _: calls.append(done))
    assert calls == []


def test_a_taken_or_unwritable_name_is_refused(engine: Engine, files: dict[str, AdapterFile]) -> None:
    with pytest.raises(UserError, match="'ink' is loaded already"):
        engine.load_adapter("ink", files["neon"])
    with pytest.raises(UserError, match="contains ':'"):
        engine.load_adapter("ink:2", files["neon"])
    with pytest.raises(UserError, match="No adapter named 'oil'"):
        engine.unload_adapter("oil")


def test_a_file_for_another_model_is_refused_and_nothing_changes(engine: Engine, tmp_path: Path) -> None:
    other = load_model(make_tiny_sd1(tmp_path / "other", latent_factor=8, layers_per_block=2))
    layer = torch.nn.Linear(5, 5)
    name = other.parts["unet"].file_name("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    file = AdapterFile({name: LoRA(layer, 2, 2.0).tensors()}, path=Path("foreign.safetensors"))
    expected = draw_one(engine, INK)
    with pytest.raises(AdapterFileError, match=r"foreign\.safetensors"):
        engine.load_adapter("foreign", file)
    assert engine.adapters == ("ink", "neon", "words")
    assert np.array_equal(draw_one(engine, INK), expected)


def test_a_picture_that_is_not_finite_is_an_error_and_no_black_picture(engine: Engine) -> None:
    with pytest.raises(RunError, match=r"'a cat' \(seed 1\).*not finite"):
        engine.generate([replace(REQUEST, adapters={"ink": 1e30})])
    assert np.isfinite(draw_one(engine, REQUEST)).all()
