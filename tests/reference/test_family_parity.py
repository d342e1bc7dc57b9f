"""SD 2.x and SDXL draw the pictures that diffusers' own pipelines draw from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.load import load_model
from tests.single_file import make_single_file
from tests.tiny import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl

ROUNDING = 2
"""Levels of 255 that float32 sums in another order may differ by."""


def stock(pipe: Any, request: Request, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    width, height = request.size or (64, 64)
    result = pipe(
        request.prompt,
        negative_prompt=request.negative,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        **options,
    )
    return np.asarray(result.images[0]).astype(int)


def ours(engine: Engine, request: Request) -> np.ndarray:
    return np.asarray(engine.generate([request])[0]).astype(int)


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 5, "a flat picture would prove nothing"
    assert np.abs(ours - expected).max() <= ROUNDING


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sd2_draws_the_same_picture(tmp_path: Path, prediction: str) -> None:
    folder = make_tiny_sd2(tmp_path, prediction=prediction)
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    request = Request("a red cat", "blurry", seed=3, steps=4, cfg=5.0, sampler="ddim")
    assert_same(ours(Engine(load_model(folder)), request), stock(pipe, request))


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize(("negative", "cfg"), [("", 5.0), ("blurry", 5.0), ("", 1.0)])
def test_sdxl_draws_the_same_picture(tmp_path: Path, size: tuple[int, int], negative: str, cfg: float) -> None:
    folder = make_tiny_sdxl(tmp_path)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    request = Request("the red cat", negative, seed=3, steps=4, cfg=cfg, size=size, sampler="ddim")
    assert_same(ours(Engine(load_model(folder)), request), stock(pipe, request))


@pytest.mark.parametrize(
    ("make", "pipeline"), [(make_tiny_sd1, StableDiffusionPipeline), (make_tiny_sdxl, StableDiffusionXLPipeline)]
)
def test_a_checkpoint_with_markers_draws_as_a_velocity_model_with_zero_terminal_snr(
    tmp_path: Path, make: Any, pipeline: Any
) -> None:
    folder = make(tmp_path / "base", prediction=None)
    extra = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = make_single_file(folder, tmp_path / "v.safetensors", extra=extra)
    pipe = pipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    request = Request("the red cat", "", seed=3, steps=5, cfg=4.0, sampler="euler")
    assert_same(ours(Engine(load_model(path, configs=folder)), request), stock(pipe, request))


def test_sdxl_conditioning_is_that_of_the_stock_pipeline(tmp_path: Path) -> None:
    folder = make_tiny_sdxl(tmp_path)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt("the red cat", do_classifier_free_guidance=False)
        found = load_model(folder).encode_text(["the red cat"])
    assert found.pooled is not None
    torch.testing.assert_close(found.hidden, hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)
