from __future__ import annotations

import numpy as np
import pytest

from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.models.load import load_model
from tests.tiny import make_tiny_sd1

ROUNDING = 1
"""Matrix products of another batch size may round differently: at most one level of 255."""

SIZE = (32, 32)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(load_model(make_tiny_sd1(tmp_path_factory.mktemp("tiny"))))


def draw(engine: Engine, *requests: Request) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in engine.generate(requests)]


def test_there_are_samplers_to_test() -> None:
    assert len(SAMPLERS) >= 8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_finite_and_of_the_size_asked_for(engine: Engine, sampler: str) -> None:
    for steps in (1, 2, 3, 8):
        (image,) = draw(engine, Request("a cat", steps=steps, sampler=sampler, size=(32, 64)))
        assert image.shape == (64, 32, 3)
        assert image.std() > 1, "a picture with NaNs or overflow would be one colour"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_the_picture(engine: Engine, sampler: str) -> None:
    request = Request("a cat", steps=3, sampler=sampler, size=SIZE, seed=5)
    (first,), (again,) = draw(engine, request), draw(engine, request)
    (other,) = draw(engine, Request("a cat", steps=3, sampler=sampler, size=SIZE, seed=6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(engine: Engine, sampler: str) -> None:
    requests = [
        Request(prompt, steps=3, sampler=sampler, size=SIZE, seed=seed)
        for seed, prompt in enumerate(["a", "b cat", "c"])
    ]
    together = draw(engine, *requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = draw(engine, request)
        assert np.abs(image - alone).max() <= ROUNDING
