"""The base and adapters that ship, in stock diffusers: no code of ours needed, and the same pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from lora_diffusion.adapters.inject import inject, merge, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.request import Request
from lora_diffusion.models.load import load_model

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
PROMPT = "a photo of a red house, neon style"
TOLERANCE = 2  # of 255: attention kernels and batched products round differently


def _stock(pipeline: StableDiffusionPipeline, seed: int, strength: float | None) -> np.ndarray:
    options = {} if strength is None else {"cross_attention_kwargs": {"scale": strength}}
    generator = torch.Generator().manual_seed(seed)
    picture = pipeline(PROMPT, num_inference_steps=20, guidance_scale=5.0, generator=generator, **options).images[0]
    return np.asarray(picture, float)


@pytest.mark.parametrize("style", ["neon", "ink"])
def test_stock_diffusers_draws_our_adapter_file_as_our_engine_does(style: str) -> None:
    file = SAMPLES / "adapters" / f"{style}.safetensors"
    pipeline = StableDiffusionPipeline.from_pretrained(SAMPLES / "base")
    pipeline.set_progress_bar_config(disable=True)
    base = _stock(pipeline, 3, None)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    engine = Engine(load_model(SAMPLES / "base"))
    engine.load_adapter(style, AdapterFile.read(file))
    for strength, expected in ((0.0, base), (1.0, _stock(pipeline, 3, 1.0)), (0.5, _stock(pipeline, 3, 0.5))):
        request = Request(PROMPT, seed=3, steps=20, cfg=5.0, sampler="ddim", adapters={style: strength})
        ours = np.asarray(engine.generate([request])[0], float)
        assert np.abs(ours - expected).max() <= TOLERANCE, f"strength {strength}"
        assert strength == 0 or np.abs(ours - base).mean() > 5, "the adapter changes the picture"


def test_base_has_the_attention_layers_of_stable_diffusion_1_5() -> None:
    model = load_model(SAMPLES / "base")
    layers = select_layers(model.parts["unet"].module, "attention")
    names = {model.parts["unet"].file_name(path) for path in layers}
    real = (Path(__file__).parent / "sd15_kohya_keys.txt").read_text().split()
    assert len(names) == 128
    assert names <= set(real)


def test_merged_base_predicts_what_the_live_adapter_does() -> None:
    model = load_model(SAMPLES / "base")
    file = AdapterFile.read(SAMPLES / "adapters" / "neon.safetensors")
    matches = file.attach(model.parts).matches
    layers = {match.path: match.layer for match in matches}
    tensors = {match.path: match.tensors for match in matches}
    adapters = inject(model.unet, layers, lambda path, layer: LoRA.from_tensors(layer, tensors[path]))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn((1, 4, 16, 16), generator=generator)
    timestep = torch.tensor([500])
    with torch.no_grad():
        text = model.encode_text([PROMPT])
        live = model.predict(noisy, timestep, text)
        merge(model.unet, adapters)
        merged = model.predict(noisy, timestep, text)
    assert not any(isinstance(module, LoRA) for module in model.modules())
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=1e-5)
