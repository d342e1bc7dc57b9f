"""Draw the golden pictures and record the golden loss curve that the regression tests compare with.

    python -m samples.make_golden

Run it only after a change that is meant to change pictures or training, look at `samples/golden/sheet.png`, and say in
the commit why they changed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from lora_diffusion.config import TrainConfig
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.grid import contact_sheet
from lora_diffusion.generation.request import Request
from lora_diffusion.models.load import load_model
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import read_metrics

SAMPLES = Path(__file__).parent
GOLDEN = SAMPLES / "golden"
LOSS_STEPS = 50

REQUESTS: dict[str, Request] = {
    "base-ddim": Request("a photo of a red house on a yellow background", seed=11, cfg=5.0),
    "base-euler-a": Request("a photo of a blue cat on a white background", seed=12, cfg=5.0, sampler="euler-a"),
    "base-dpm++2m-karras": Request(
        "a photo of a green tree on a pink background", seed=13, steps=15, cfg=5.0, sampler="dpm++2m-karras"
    ),
    "neon": Request("a photo of a red house, neon style", seed=11, cfg=5.0, adapters={"neon": 1.0}),
    "ink": Request("a photo of a red house, ink style", seed=11, cfg=5.0, adapters={"ink": 1.0}),
    "neon-and-ink": Request("a photo of a red house, neon style", seed=11, cfg=5.0, adapters={"neon": 0.5, "ink": 0.5}),
}


def draw_golden(device: torch.device | str = "cpu") -> dict[str, Image.Image]:
    """Every golden picture, drawn now: one by one; on a CPU on as many threads as torch has."""
    engine = Engine(load_model(SAMPLES / "base", device=device))
    for name in ("neon", "ink"):
        engine.load_adapter(name, AdapterFile.read(SAMPLES / "adapters" / f"{name}.safetensors"))
    return {name: engine.generate([request])[0] for name, request in REQUESTS.items()}


def train_golden(folder: Path) -> list[float]:
    """The losses of the first 50 steps of the ink data set on the sample base, in float32 on the CPU."""
    text = f"""
        [run]
        name = "golden"
        output = {json.dumps(str(folder / "run"))}
        steps = {LOSS_STEPS}
        batch_size = 2
        seed = 5
        device = "cpu"
        precision = "fp32"
        save_every = 0
        [model]
        path = {json.dumps(str(SAMPLES / "base"))}
        [adapter]
        rank = 4
        targets = "attention"
        [[dataset]]
        path = {json.dumps(str(SAMPLES / "ink"))}
        resolution = 64
        [optimizer]
        lr = 1e-3
        [schedule]
        name = "constant"
        [loss]
        min_snr_gamma = 5.0
        noise_offset = 0.1
        [cache]
        folder = {json.dumps(str(folder / "cache"))}
    """
    config = TrainConfig.parse(text)
    run = RunFolder(config.run.output)
    run.path.mkdir(parents=True)
    build(config, run, make_accelerator(config), resume=False).fit()
    return [line["loss"] for line in read_metrics(run.metrics)]


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    pictures = draw_golden()
    for name, picture in pictures.items():
        picture.save(GOLDEN / f"{name}.png", optimize=True)
    contact_sheet([list(pictures.values())], [""], list(pictures)).save(GOLDEN / "sheet.png", optimize=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = train_golden(Path(folder))
    (GOLDEN / "losses.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
