"""How well a recipe learns: the share of pictures that are both in style and right in content.

    python -m benchmarks.quality --config configs/quickstart.toml --seeds 1 2 3 --set run.steps=200 --out results.json

Trains every style with every seed from scratch and draws 64 prompts that the data sets do not hold. One cell moves by
up to 30 points with the seed, so only means over seeds are compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import torch

from lora_diffusion.config import TrainConfig
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from samples.evaluate_styles import STYLES, draw, shares
from samples.judge import Judge
from samples.prompts import style_prompts

logger = logging.getLogger(__name__)


def train_and_judge(config: TrainConfig, style: str, judge: Judge) -> dict[str, float]:
    """Train in a temporary run folder; judge the live adapter at strength 1."""
    run = RunFolder(config.run.output)
    run.path.mkdir(parents=True)
    started = time.monotonic()
    trainer = build(config, run, make_accelerator(config), resume=False)
    trainer.fit()
    trained = time.monotonic()
    prompts = style_prompts(style)
    result = shares(judge, draw(trainer.previewer.engine, prompts, {}), prompts, style)
    return result | {"train_seconds": trained - started, "judge_seconds": time.monotonic() - trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--styles", nargs="+", default=list(STYLES))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves the choice to torch")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    judge = Judge.load()
    cells: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for style in arguments.styles:
            for seed in arguments.seeds:
                own = {"run.name": style, "run.output": f"{folder}/{style}-{seed}", "run.seed": seed}
                own |= {"dataset.0.path": f"samples/{style}", "preview.prompts": [], "cache.folder": f"{folder}/cache"}
                overrides = [f"{key}={json.dumps(value)}" for key, value in own.items()]
                config = TrainConfig.load(arguments.config, [*arguments.overrides, *overrides])
                cells[f"{style}-{seed}"] = cell = train_and_judge(config, style, judge)
                print(style, seed, {key: round(value, 3) for key, value in cell.items()}, flush=True)
    mean = {key: sum(cell[key] for cell in cells.values()) / len(cells) for key in ("style", "content", "both")}
    print("mean", {key: round(value, 3) for key, value in mean.items()}, " ".join(arguments.overrides))
    if arguments.out:
        arguments.out.write_text(json.dumps({"overrides": arguments.overrides, "cells": cells, "mean": mean}, indent=2))


if __name__ == "__main__":
    main()
