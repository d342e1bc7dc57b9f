"""Stands in for the training process in tests of the queue: the real files of a run, without a model.

python fake_trainer.py CONFIG [--resume]. The seconds of a step are in the data set's path ("0.01"); a path "deaf" hangs
in the third step and passes over signals, "broken" fails the start until such a folder is there, and "nan" fails at the
third step.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import tomllib
from pathlib import Path

from lora_diffusion.runs import Failure, RunFolder

SAVE_EVERY = 5


def save(run: RunFolder, step: int) -> None:
    target = run.checkpoints / f"{step:06d}"
    temporary = run.checkpoints / f".tmp-{step}"
    temporary.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        temporary.rename(target)


def train(run: RunFolder, steps: int, name: str, how: str, resume: bool) -> None:
    run.prepare(resume=resume)
    step = max((int(entry.name) for entry in run.checkpoints.glob("[0-9]*")), default=0) if resume else 0
    run.begin(step, steps)
    run.control.mkdir(exist_ok=True)
    while step < steps:
        time.sleep(float(how) if how[0].isdigit() else 0.02)
        step += 1
        while how == "deaf" and step == 3:
            time.sleep(1)
        if how == "nan" and step == 3:
            run.end("failed", Failure("RunError", "the loss is nan", "lower lr"))
            raise SystemExit(3)
        with run.metrics.open("a") as file:
            file.write(json.dumps({"segment": 0, "step": step, "loss": 1.0 / step}) + "\n")
        run.beat(step, steps, 0.01)
        if step % SAVE_EVERY == 0:
            save(run, step)
        if "stop" in run.take_control():
            save(run, step)
            run.end("stopped")
            return
    run.adapter(name).write_bytes(b"weights")
    run.end("finished")


if __name__ == "__main__":
    config = tomllib.loads(Path(sys.argv[1]).read_text())
    how = config["dataset"][0]["path"]
    if how == "broken" and not Path(how).is_dir():
        print("Error: data/broken is not a folder.", file=sys.stderr)
        sys.exit(2)
    if how == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    folder = RunFolder(Path(config["run"]["output"]))
    with folder.lock():
        train(folder, config["run"]["steps"], config["run"]["name"], how, "--resume" in sys.argv)
