"""Our engine and diffusers' own StableDiffusionPipeline draw the same pictures from the same files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.models.load import load_model
from tests.random_adapters import random_adapter
from tests.tiny import make_tiny_sd1

ROUNDING = 2
"""Levels of 255 that float32 sums in another order may differ by."""

REQUEST = Request("a red cat at the house", "blurry", seed=3, steps=4, cfg=5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(load_model(folder))


@pytest.fixture(scope="module")
def adapter_path(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    file = random_adapter(engine.model, seed=1, parts=("unet", "text_encoder"), targets="full")
    file.write(path, dtype=torch.float32)
    return path


@pytest.fixture
def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe: StableDiffusionPipeline, request: Request, **options: Any) -> np.ndarray:
    result = pipe(
        request.prompt,
        negative_prompt=request.negative,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        **options,
    )
    return np.asarray(result.images[0]).astype(int)


def ours(engine: Engine, request: Request) -> np.ndarray:
    return np.asarray(engine.generate([request])[0]).astype(int)


def test_the_base_draws_the_same_picture(engine: Engine, pipeline: StableDiffusionPipeline) -> None:
    expected = stock(pipeline, REQUEST)
    assert expected.std() > 5, "a flat picture would prove nothing"
    assert np.abs(ours(engine, REQUEST) - expected).max() <= ROUNDING


@pytest.mark.parametrize("cfg", [1.0, 7.5])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_other_sizes_and_guidance_scales_draw_the_same_picture(
    engine: Engine, pipeline: StableDiffusionPipeline, size: tuple[int, int], cfg: float
) -> None:
    request = replace(REQUEST, size=size, cfg=cfg)
    expected = stock(pipeline, request, width=size[0], height=size[1])
    assert np.abs(ours(engine, request) - expected).max() <= ROUNDING


def test_clip_skip_2_is_1_in_diffusers_counting(engine: Engine, pipeline: StableDiffusionPipeline) -> None:
    # Without guidance: diffusers skips no layer for the negative prompt, where A1111 and we do.
    request = replace(REQUEST, cfg=1.0)
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 looks for a level that transformers 5 dropped
        object.__setattr__(encoder, "text_model", encoder)
    expected = stock(pipeline, request, clip_skip=1)
    assert np.abs(ours(engine, replace(request, clip_skip=2)) - expected).max() <= ROUNDING
    assert np.abs(ours(engine, request) - expected).max() > ROUNDING


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_the_same_picture(engine: Engine, pipeline: StableDiffusionPipeline, name: str) -> None:
    sampler = SAMPLERS[name]
    scheduler_class = getattr(diffusers, sampler.scheduler)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **sampler.options)
    request = replace(REQUEST, sampler=name)
    assert np.abs(ours(engine, request) - stock(pipeline, request)).max() <= ROUNDING


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_adapter_file_draws_the_same_picture_at_every_strength(
    engine: Engine, pipeline: StableDiffusionPipeline, adapter_path: Path, strength: float
) -> None:
    base = ours(engine, REQUEST)
    pipeline.load_lora_weights(str(adapter_path.parent), weight_name=adapter_path.name, adapter_name="style")
    pipeline.set_adapters(["style"], [strength])
    expected = stock(pipeline, REQUEST)
    engine.load_adapter("style", AdapterFile.read(adapter_path))
    try:
        drawn = ours(engine, replace(REQUEST, adapters={"style": strength}))
    finally:
        engine.unload_adapter("style")
    assert np.abs(drawn - expected).max() <= ROUNDING
    assert np.abs(drawn - base).max() > 10 * ROUNDING, "the adapter changes the picture"


def test_two_adapters_draw_the_same_picture(
    engine: Engine, pipeline: StableDiffusionPipeline, adapter_path: Path, tmp_path: Path
) -> None:
    random_adapter(engine.model, seed=2).write(tmp_path / "other.safetensors", dtype=torch.float32)
    strengths = {"style": 0.7, "other": -0.4}
    for name, path in (("style", adapter_path), ("other", tmp_path / "other.safetensors")):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        engine.load_adapter(name, AdapterFile.read(path))
    try:
        pipeline.set_adapters(list(strengths), list(strengths.values()))
        drawn = ours(engine, replace(REQUEST, adapters=strengths))
    finally:
        for name in strengths:
            engine.unload_adapter(name)
    assert np.abs(drawn - stock(pipeline, REQUEST)).max() <= ROUNDING


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("latent_factor", [4, 8])
def test_other_kinds_of_base_draw_the_same_picture(tmp_path: Path, prediction: str, latent_factor: int) -> None:
    folder = make_tiny_sd1(tmp_path, seed=4, prediction=prediction, latent_factor=latent_factor)
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(ours(Engine(load_model(folder)), REQUEST) - stock(pipe, REQUEST)).max() <= ROUNDING
