"""Small runs for tests: a folder of drawn pictures, a config, and the two ways to train it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomlkit
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.config import TrainConfig
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("red", "green", "blue", "orange", "purple")


def draw_pictures(folder: Path, count: int = 10) -> Path:
    """`count` captioned pictures of two shapes, so that there are two buckets and short last batches."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        image = Image.new("RGB", (64, 64) if index % 3 else (96, 48), "white")
        ImageDraw.Draw(image).ellipse((8 + index, 8, 40 + index, 40), fill=colour)
        image.save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a {colour} cat", encoding="utf-8")
    return folder


def write_config(path: Path, base: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """A quick run on `base` and `data`; `sections` overrides its keys."""
    config: dict[str, Any] = {
        "run": {"name": "test", "output": str(path.parent / "run"), "steps": 6, "batch_size": 2, "seed": 3}
        | {"precision": "fp32", "device": "cpu", "save_every": 0},
        "model": {"path": str(base)},
        "adapter": {"rank": 4, "alpha": 4.0},
        "dataset": [{"path": str(data), "resolution": 32}],
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "preview": {"every": 0},
        "cache": {"folder": str(path.parent / "cache")},
    }
    for name, values in sections.items():
        if name == "dataset":
            config["dataset"] = [config["dataset"][0] | values]
        else:
            config[name] = config.get(name, {}) | values
    path.write_text(tomlkit.dumps(config), encoding="utf-8")
    return path


def prepare(config_path: Path, *overrides: str, resume: bool = False) -> Trainer:
    """A trainer in this process, its run folder made."""
    config = TrainConfig.load(config_path, overrides)
    run = RunFolder(config.run.output)
    run.path.mkdir(parents=True, exist_ok=True)
    return build(config, run, make_accelerator(config), resume=resume)


def prepare_quiet(config_path: Path, *overrides: str, resume: bool = False) -> Trainer:
    """A trainer whose steps the host does not wait for: CUDA graphs on a GPU; on a CPU what these are made of."""
    trainer = prepare(config_path, *overrides, resume=resume)
    if trainer.accelerator.device.type == "cpu":
        trainer.plan = replace(trainer.plan, launch="quiet")
    return trainer


def launch(config_path: Path, *arguments: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`accelerate launch [launcher…] train.py --config …` as a user would type it; one thread per process."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *(launcher or ("--cpu", "--num_processes", "1"))]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), "--config", str(config_path), *arguments],
        cwd=config_path.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a test can kill the launcher and its children together
    )


def tensor_hash(adapter: Path) -> str:
    """sha256 of the tensors of an adapter file; its metadata holds dates and is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(adapter).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def distance(adapter: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two adapters over that of what the second one learned: the factors that start at 0.

    A matrix product over more rows, or by another kernel, adds the same float32 numbers in another order, so a gradient
    differs by about 1e-6 of its size. AdamW divides by the gradient's own size: where that is near 0, an entry may move
    by a learning rate in another direction. So all entries are compared together.
    """
    assert adapter.keys() == other.keys()
    assert len(other) > 100
    difference = sum(float((adapter[name] - other[name]).square().sum()) for name in other) ** 0.5
    started_at_0 = [name for name in other if name.endswith(("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b"))]
    learned = sum(float(other[name].square().sum()) for name in started_at_0) ** 0.5
    assert learned > 0
    return difference / learned
