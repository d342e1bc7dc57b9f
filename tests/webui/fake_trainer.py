"""Stands in for the training process: writes a run's files without a model. The loss falls, previews are dots."""

from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path

from PIL import Image

from lora_diffusion.runs import RunFolder

SECONDS_PER_STEP = 0.03
PREVIEW_EVERY = 20


def fake_command(config: Path, resume: bool) -> list[str]:
    return [sys.executable, __file__, str(config), *(["--resume"] if resume else [])]


def train(run: RunFolder, config: str, resume: bool) -> None:
    settings = tomllib.loads(config)
    steps, name = settings["run"]["steps"], settings["run"]["name"]
    run.prepare(resume=resume)
    run.config.write_text(config, encoding="utf-8")
    step = max((int(entry.name) for entry in run.checkpoints.glob("[0-9]*")), default=0) if resume else 0
    run.begin(step, steps)
    for folder in (run.control, run.previews, run.checkpoints):
        folder.mkdir(exist_ok=True)
    while step < steps:
        time.sleep(SECONDS_PER_STEP)
        step += 1
        with run.metrics.open("a") as file:
            file.write(json.dumps({"segment": int(resume), "step": step, "loss": 0.1 + 1 / step, "lr": 1e-4}) + "\n")
        with run.log.open("a") as file:
            file.write(f"step {step}/{steps}\n")
        run.beat(step, steps, SECONDS_PER_STEP)
        asked = run.take_control()
        if step % PREVIEW_EVERY == 0 or "sample_now" in asked:
            Image.new("RGB", (32, 32), (step % 256, 90, 120)).save(run.preview(step, 0))
        if step % PREVIEW_EVERY == 0 or "save_now" in asked or "stop" in asked:
            (run.checkpoints / f"{step:06d}").mkdir(exist_ok=True)
        if "stop" in asked:
            run.end("stopped")
            return
    run.adapter(name).write_bytes(b"weights")
    run.end("finished")


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    folder = RunFolder(Path(tomllib.loads(text)["run"]["output"]))
    with folder.lock():
        train(folder, text, "--resume" in sys.argv)
