"""What saves memory on a GPU: bases in 4 and 8 bits, moments in 8 bits, checkpointed blocks; and what `check` says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_diffusion.check import check_run
from lora_diffusion.config import TrainConfig
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from lora_diffusion.models.quantise import QuantisedLinear, quantise_linears
from lora_diffusion.streams import stream
from lora_diffusion.training.memory import PeakMemory, resident_bytes
from lora_diffusion.training.tracking import read_metrics
from tests.shipped import BASE, write_ink_config
from tests.training_runs import distance, prepare, prepare_quiet

pytestmark = pytest.mark.gpu

Graphs = Callable[[], list[int]]
Record = Callable[[str, Any], None]
Kind = Literal["nf4", "int8"]

BF16 = 0.05
"""Of what was learned, in bfloat16: kernels of a GPU add in an order of their own, and AdamW turns a last bit of a
small gradient into a part of the learning rate."""

kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


@torch.no_grad()
def predict(model: DiffusionModel, device: torch.device) -> Tensor:
    noisy = torch.randn((2, model.latent_channels, 16, 16), generator=stream(0, "noisy")).to(device)
    text = model.encode_text(["a cat", "a red house"]).with_size(torch.zeros(6))
    return model.predict(noisy, torch.tensor([100, 700], device=device), text)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantised_base_predicts_what_one_with_the_unpacked_weights_does(
    device: torch.device, kind: Kind, dtype: torch.dtype
) -> None:
    quantised = load_model(BASE, dtype=dtype, device=device, quantise=kind)
    plain = load_model(BASE, dtype=dtype, device=device)
    exact = predict(plain, device)
    layers = [(path, m) for path, m in quantised.unet.named_modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == 184, "every linear layer of the UNet"
    for path, layer in layers:
        plain.unet.get_parameter(f"{path}.weight").data.copy_(layer.dequantised_weight())

    found = predict(quantised, device)
    assert torch.equal(found, predict(plain, device)), "the same products of the same numbers"
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < (0.1 if kind == "nf4" else 0.02)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.3), ("int8", 0.55)])
def test_layers_of_stable_diffusion_take_a_share_of_their_16_bits(
    device: torch.device, kind: Kind, share: float, record_property: Record
) -> None:
    """Allocated, and not only counted: nothing of the packing is left behind."""

    def held() -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if device.type == "cuda" else sum(p.nbytes for p in root.parameters())

    root = nn.Sequential()
    before = held()
    for out, inputs in [(320, 320), (320, 768), (1280, 5120), (1280, 1280)]:
        root.append(nn.Linear(inputs, out, dtype=torch.bfloat16, device=device).requires_grad_(False))
    plain = held() - before
    quantise_linears(root, kind, device)
    quantised = held() - before
    record_property("bytes", (plain, quantised))
    assert quantised < share * plain


@kinds
def test_steps_on_a_quantised_base_are_launched_as_a_graph(
    device: torch.device, kind: Kind, tmp_path: Path, graphs: Graphs, record_property: Record
) -> None:
    config = write_ink_config(tmp_path / "run.toml", device.type, run={"steps": 6}, model={"quantise": kind})
    adapters = []
    for make in (prepare, prepare_quiet):
        override = f"run.cuda_graph={'true' if make is prepare_quiet else 'false'}"
        adapters.append(load_file(make(config, override, f"run.output='{tmp_path / make.__name__}'").fit()))

    record_property("distance", distance(*adapters))
    assert distance(*adapters) < BF16, "layers with one input are computed together"
    if device.type == "cuda":
        assert graphs() == [1]


def test_moments_of_8_bits_learn_and_are_resumed(device: torch.device, tmp_path: Path, record_property: Record) -> None:
    if device.type == "cpu":
        pytest.skip("bitsandbytes' optimisers are for GPUs")
    sections: dict[str, dict[str, Any]] = {
        "adapter": {"rank": 64, "alpha": 64.0},  # bitsandbytes keeps fewer than 4096 values in 32 bits
        "optimizer": {"name": "adamw8bit", "lr": 1e-3},
    }
    config = write_ink_config(tmp_path / "whole.toml", device.type, **sections)
    trainer = prepare(config)
    assert trainer.plan.launch == "eager"
    whole = load_file(trainer.fit())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in states)
    validation = [line["val_loss"] for line in read_metrics(trainer.run.metrics) if "val_loss" in line]
    assert validation[-1] < 0.97 * validation[0]

    run = {"output": str(tmp_path / "parts")}
    config = write_ink_config(tmp_path / "parts.toml", device.type, run=run, **sections)
    first = prepare(config)
    first.plan = replace(first.plan, steps=5)
    first.fit()
    resumed = load_file(prepare(config, resume=True).fit())
    record_property("distance", distance(resumed, whole))
    assert distance(resumed, whole) < BF16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_give_the_same_gradients_in_less_memory(
    device: torch.device, precision: str, tmp_path: Path, record_property: Record
) -> None:
    config = write_ink_config(tmp_path / "run.toml", device.type, run={"batch_size": 8, "precision": precision})
    gradients: list[list[Tensor]] = []
    peaks: list[int] = []
    for value in ("false", '"outer"', "true"):
        trainer = prepare(config, f"model.gradient_checkpointing={value}")
        generator = stream(0, "weights")
        with torch.no_grad():
            for parameter in trainer.parameters:  # else the factors that start at 0 stop all others' gradients
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(device)
        batch = trainer.source[0].to(device)
        text = trainer.conditioning(batch.captions)
        with PeakMemory(device) as memory:
            loss = trainer.loss(batch, text).sum()
            gradients.append(list(torch.autograd.grad(loss, list(trainer.parameters))))
        peaks.append(memory.bytes)
        del trainer, loss
        gc.collect()

    record_property("peaks", peaks)
    for found in gradients[1:]:
        for gradient, expected in zip(found, gradients[0], strict=True):
            # the same kernels on the same numbers; atomic additions may come in another order
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    if device.type == "cuda":
        assert peaks[2] < peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("precision", "batch_size", "checkpointing"), [("fp32", 32, "false"), ("bf16", 64, "false"), ("bf16", 64, "true")]
)
def test_the_memory_that_check_tells_is_what_a_training_takes(
    device: torch.device, precision: str, batch_size: int, checkpointing: str, tmp_path: Path, record_property: Record
) -> None:
    if device.type == "cpu":
        batch_size = 4
    run = {"steps": 6, "batch_size": batch_size, "precision": precision}
    config = write_ink_config(
        tmp_path / "run.toml",
        device.type,
        run=run,
        dataset={"resolution": 64, "repeats": 16},
        validation={"every": 0},
    )
    overrides = [f"model.gradient_checkpointing={checkpointing}"]
    told = check_run(TrainConfig.load(config, overrides)).memory_bytes
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with PeakMemory(device) as memory:
        prepare_quiet(config, *overrides).fit()

    record_property("told_and_taken", (told, memory.bytes))
    if device.type == "cuda":
        record_property("reserved", torch.cuda.max_memory_reserved())
        # cuBLAS keeps 32 MiB per handle and stream, and a graph has its own: nothing beside a base of real size.
        assert told == pytest.approx(memory.bytes, rel=0.15, abs=4 * 2**25)


@pytest.fixture
def small_card(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Bytes that this process may use, as on a card that has no more: 3 GiB beyond what it holds."""
    room = 3 * 2**30 if device.type == "cuda" else 2**29
    limit = room + (torch.cuda.memory_reserved() if device.type == "cuda" else resident_bytes())
    monkeypatch.setattr("lora_diffusion.training.estimate.memory_limit", lambda _: limit)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    yield limit
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("has_short_batches", [False, True])
def test_the_largest_batch_that_check_tells_is_trained_on_a_small_card(
    device: torch.device,
    small_card: int,
    has_short_batches: bool,
    tmp_path: Path,
    graphs: Graphs,
    record_property: Record,
) -> None:
    config = write_ink_config(
        tmp_path / "run.toml",
        device.type,
        run={"steps": 12, "batch_size": 4},
        dataset={"resolution": 64},
        validation={"every": 0},
    )
    largest = check_run(TrainConfig.load(config, [])).largest_batch
    record_property("largest", largest)
    assert largest > 4
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        largest = 4
    # Batches of one size, or four of the largest size and then one of most of it, over and over.
    repeats = ceil(4.8 * largest / 32) if has_short_batches else 12 * largest
    trainer = prepare_quiet(config, f"run.batch_size={largest}", f"dataset.0.repeats={repeats}")
    trainer.fit()

    assert trainer.step == 12
    assert len(read_metrics(trainer.run.metrics)) == 12
    record_property("graphs", graphs())
