"""A whole run with each model family: train, validate, draw previews, save, and use the file in the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lora_diffusion.check import check_run
from lora_diffusion.config import TrainConfig
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.models.load import load_model
from tests.contract.test_families import TINY
from tests.single_file import make_single_file
from tests.training_runs import draw_pictures, prepare, tensor_hash, write_config

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
PREFIXES = {"sd1": {"lora_unet", "lora_te"}, "sd2": {"lora_unet", "lora_te"}}
PREFIXES |= {"sdxl": {"lora_unet", "lora_te1", "lora_te2"}}


def write(folder: Path, family: str, **sections: dict[str, Any]) -> Path:
    base = TINY[family](folder / "base")
    data = draw_pictures(folder / "pictures", count=4)
    defaults = {
        "run": {"steps": 3},
        "preview": {"every": 3, "prompts": ["a cat"], "steps": 2, "sampler": "ddim"},
        "validation": {"every": 3, "fraction": 0.3},
        "schedule": {"name": "constant", "warmup_steps": 0},
    }
    return write_config(folder / "run.toml", base, data, **(defaults | sections))


@pytest.mark.parametrize("trains_text", [False, True])
@pytest.mark.parametrize("family", sorted(TINY))
def test_a_run_makes_an_adapter_that_changes_the_bases_pictures(family: str, trains_text: bool, tmp_path: Path) -> None:
    adapter = {"text_encoder": trains_text, "targets": "full"}
    trainer = prepare(write(tmp_path, family, adapter=adapter, optimizer={"lr": 0.05}))
    path = trainer.fit()
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == VERSIONS[family]
    assert metadata["ss_v2"] == str(family == "sd2")
    found = {name.split("_text_model")[0] if "_text_model" in name else "lora_unet" for name in names}
    assert found == (PREFIXES[family] if trains_text else {"lora_unet"})
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("val_loss" in line for line in lines)
    engine = Engine(load_model(tmp_path / "base"))
    engine.load_adapter("test", AdapterFile.read(path))
    request = Request("a cat", seed=1, steps=2, sampler="ddim")
    with_adapter = Request("a cat", seed=1, steps=2, sampler="ddim", adapters={"test": 1.0})
    plain, changed = (np.asarray(image).astype(int) for image in engine.generate([request, with_adapter]))
    assert np.abs(plain - changed).max() > 3


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_run_on_a_single_file_makes_the_adapter_that_the_folder_makes(family: str, tmp_path: Path) -> None:
    config = write(tmp_path, family, preview={"every": 0}, validation={"every": 0})
    expected = tensor_hash(prepare(config).fit())
    path = make_single_file(tmp_path / "base", tmp_path / "base.safetensors")
    single = [f"model.path={path}", f"model.configs={tmp_path / 'base'}", f"run.output={tmp_path / 'other'}"]
    assert tensor_hash(prepare(config, *single).fit()) == expected


@pytest.mark.parametrize("family", sorted(TINY))
def test_check_tells_the_family_and_the_cost(family: str, tmp_path: Path) -> None:
    report = check_run(TrainConfig.load(write(tmp_path, family)))
    assert report.family == family
    assert report.seconds_per_step > 0
    assert report.adapter_layers > 50


def test_sdxl_trains_with_the_true_sizes_of_its_pictures(tmp_path: Path) -> None:
    """The pictures are 96x48 (cut to 32x32) and 64x64 px."""
    config = write(tmp_path, "sdxl", dataset={"buckets": False, "flip": True}, validation={"every": 0})
    source = prepare(config).source
    rows = {
        (*batch.sizes[i].tolist(), batch.names[i])
        for index in range(8 * source.batches.batches_per_epoch)
        for batch in [source[index]]
        for i in range(len(batch.names))
    }
    wide = {row[:6] for row in rows if row[6] in ("00.png", "03.png")}
    square = {row[:6] for row in rows if row[6] in ("01.png", "02.png")}
    assert wide == {(48, 96, 0, 16, 32, 32)}, "resized to 64x32, so 16 px are cut on the left"
    assert square == {(64, 64, 0, 0, 32, 32)}


def test_a_layer_that_sdxl_does_not_read_is_refused_before_any_work(tmp_path: Path) -> None:
    config = write(tmp_path, "sdxl", model={"path": str(tmp_path / "base"), "clip_skip": 3})
    with pytest.raises(Exception, match="clip_skip is 3, but SDXL"):
        prepare(config)


def test_sizes_of_the_batch_reach_the_model(tmp_path: Path) -> None:
    trainer = prepare(write(tmp_path, "sdxl"))
    batch = trainer.source[0]
    text = trainer.conditioning(batch.captions)
    with torch.no_grad():
        usual = trainer.loss(batch, text)
        other = trainer.loss(type(batch)(**(vars(batch) | {"sizes": batch.sizes + 100})), text)
    assert not torch.allclose(usual, other)
