"""Pictures drawn on a GPU: those that are drawn on a CPU, alone or together, and nothing is left in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Cancelled, Engine, Request
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.models.load import load_model
from lora_diffusion.streams import stream
from samples.make_golden import GOLDEN, draw_golden
from tests.random_adapters import random_adapter
from tests.shipped import ADAPTERS, BASE, INK

pytestmark = pytest.mark.gpu

Record = Callable[[str, Any], None]

REQUEST = Request("a photo of a red house", seed=11, steps=8, cfg=5.0)


def shipped_engine(device: torch.device, dtype: torch.dtype = torch.float32) -> Engine:
    engine = Engine(load_model(BASE, dtype=dtype, device=device))
    for name in ("neon", "ink"):
        engine.load_adapter(name, AdapterFile.read(ADAPTERS / f"{name}.safetensors"))
    return engine


def difference(picture: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(other.convert("RGB"), float))


def allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# TF32, which cuDNN uses unless told not to, keeps 10 bits of each factor of a convolution: 0.05 %, carried on by all$
# steps. Other samplers, seeds or adapters differ by more than 5 levels in the mean.
@pytest.mark.parametrize(("allow_tf32", "largest", "mean"), [(False, 16, 0.5), (True, 96, 2.0)])
def test_golden_pictures_are_drawn(
    device: torch.device, allow_tf32: bool, largest: int, mean: float, record_property: Record
) -> None:
    if allow_tf32 and device.type == "cpu":
        pytest.skip("TF32 is for GPUs")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=allow_tf32):
        pictures = draw_golden(device)
    assert len(pictures) == 6
    found = {name: difference(picture, Image.open(GOLDEN / f"{name}.png")) for name, picture in pictures.items()}
    record_property("largest_and_mean", {name: (float(d.max()), float(d.mean())) for name, d in found.items()})
    for name, values in found.items():
        assert values.max() <= largest and values.mean() <= mean, (name, values.max(), values.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_with_different_adapters_in_one_batch_are_those_drawn_alone(
    device: torch.device, dtype: torch.dtype, record_property: Record
) -> None:
    engine = shipped_engine(device, dtype)
    mixes: list[dict[str, float]] = [{}, {"ink": 1.0}, {"neon": 1.0}, {"ink": 0.5, "neon": 0.5}, {"ink": -0.5}]
    requests = [replace(REQUEST, adapters=mix) for mix in mixes]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    means = [float(difference(a, b).mean()) for a, b in zip(together, alone, strict=True)]
    others = [float(difference(a, b).mean()) for i, a in enumerate(alone) for b in alone[:i]]

    record_property("means", (means, min(others)))
    # Another batch size means other kernels, which add in another order; bfloat16 rounds each sum to 8 bits.
    assert max(means) < (0.5 if dtype == torch.float32 else 4.0)
    assert max(means) < min(others) / 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_the_vae_in_half_precision_gives_the_latents_and_pixels_of_float32(
    device: torch.device, dtype: torch.dtype, tolerance: float, record_property: Record
) -> None:
    """Tolerances: ten times a rounding of 11 bits, or of 8, of the norm."""
    pixels = torch.stack([pixels_of(path) for path in sorted(INK.glob("*.png"))[:8]]).to(device)
    exact = load_model(BASE, device=device)
    half = load_model(BASE, vae_dtype=dtype, device=device)
    assert half.vae.dtype == dtype
    latents, _ = exact.encode_image(pixels)
    pairs = [
        (half.encode_image(pixels)[0], latents),
        (half.decode_latents(latents), exact.decode_latents(latents)),
    ]
    errors = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
    record_property("errors", errors)
    assert all(torch.isfinite(found).all() for found, _ in pairs)
    assert max(errors) < tolerance


def pixels_of(path: Path) -> Tensor:
    """(3, 64, 64) in [-1, 1]."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB").resize((64, 64)), np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def test_a_cancelled_drawing_gives_its_memory_back_and_the_next_is_as_ever(device: torch.device) -> None:
    engine = shipped_engine(device)
    request = replace(REQUEST, adapters={"ink": 1.0})
    (expected,) = engine.generate([request])
    before = allocated(device)

    def cancel(done: int, _total: int) -> None:
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.generate([replace(request, seed=seed) for seed in range(8)], on_step=cancel)
    assert allocated(device) == before
    (again,) = engine.generate([request])
    assert difference(again, expected).max() == 0


def test_an_engine_that_makes_way_holds_nothing_on_the_device_and_draws_the_same_afterwards(
    device: torch.device,
) -> None:
    start = allocated(device)
    engine = shipped_engine(device)
    requests = [replace(REQUEST, adapters=adapters) for adapters in ({"ink": 1.0}, {"neon": 0.7})]
    expected = engine.generate(requests)
    engine.make_way()
    engine.make_way()
    assert allocated(device) == start
    assert engine.model.unet.device.type == "cpu"
    for picture, before in zip(engine.generate(requests), expected, strict=True):
        assert difference(picture, before).max() == 0
    assert engine.model.unet.device.type == device.type


def test_adapters_used_longest_ago_leave_the_device(device: torch.device, tiny_sd1: Path, tmp_path: Path) -> None:
    model = load_model(tiny_sd1)
    for seed, name in enumerate(("a", "b", "c")):
        random_adapter(model, seed=seed).write(tmp_path / f"{name}.safetensors", dtype=torch.float32)
    engine = Engine(model.to(device))
    start = allocated(device)
    library = AdapterLibrary(engine, [tmp_path], budget_bytes=2**30)
    sizes: dict[int, int] = {}
    for count, names in enumerate((["a"], ["a", "b"], ["a", "b", "c"]), start=1):
        library.need(names)
        sizes[count] = allocated(device) - start
    if device.type == "cuda":
        assert 0 < sizes[1] < sizes[2] < sizes[3]
    size = engine.adapter_bytes["a"]
    for name in engine.adapters:
        engine.unload_adapter(name)
    del library
    assert allocated(device) == start

    library = AdapterLibrary(engine, [tmp_path], budget_bytes=2 * size)
    for name in ("a", "b", "a", "c"):
        library.need([name])
        held = allocated(device) - start
        assert held <= sizes[2]
    assert set(engine.adapters) == {"a", "c"}, "b was used longest ago"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_fused_attention_computes_what_plain_attention_does(
    device: torch.device, dtype: torch.dtype, tolerance: float, record_property: Record
) -> None:
    """Tolerances, of the norm: a last bit may turn a rounding of TF32 in the convolutions, or of bfloat16."""
    predictions: list[Tensor] = []
    for attention in ("eager", "sdpa"):
        model = load_model(BASE, dtype=dtype, device=device, attention=attention)
        noisy = torch.randn((2, model.latent_channels, 16, 16), generator=stream(0, "noisy")).to(device)
        text = model.encode_text(["a cat", "a red house"]).with_size(torch.zeros(6))
        with torch.no_grad():
            predictions.append(model.predict(noisy, torch.tensor([100, 700], device=device), text))
    plain, fused = predictions
    record_property("error", float((fused - plain).norm() / plain.norm()))
    assert (fused - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_linear_layer_and_its_lora_in_one_step_of_autograd_are_the_plain_twin(
    device: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    """Tolerances: some roundings of the dtype, of the norm; the factors are float32."""
    generator = stream(0, "layer")
    base = torch.nn.Linear(320, 640).to(dtype).requires_grad_(False)
    adapter = LoRA(base, 8, 12.0, generator=generator)
    x, grad_output = (torch.randn((4, 77, width), generator=generator).to(device, dtype) for width in (320, 640))
    with torch.no_grad():
        for weight in (base.weight, *adapter.trained()):
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    adapter.to(device)
    results: list[list[Tensor]] = []
    for forward in (adapter.forward, lambda x: Adapter.forward(adapter, x)):
        leaf = x.clone().requires_grad_()
        output = forward(leaf)
        results.append([output, *torch.autograd.grad(output, [leaf, *adapter.trained()], grad_output)])
    for fused, plain in zip(*results, strict=True):
        assert (fused - plain).norm() <= tolerance * plain.norm()
