"""What `benchmarks.scaling` measures in a process of its own: one scan, or one start with some steps."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WARM_UPS = 16  # after the first step: those of both shapes are recorded


def scan(folder: Path, memory: Path) -> dict[str, float]:
    """Sizes, hashes and captions of a folder; memory: where they are remembered."""
    from lora_diffusion.data.buckets import Size, make_buckets
    from lora_diffusion.data.folder import picture_facts, scan_folder

    buckets = make_buckets(Size(64, 64), min_side=32, max_side=128, step=8)
    before = _memory_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    found = scan_folder(folder, buckets=buckets, facts=picture_facts(memory, folder))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"images": len(found.samples), "wall_s": wall, "cpu_s": cpu, "added_mb": _memory_mb() - before}


def train(config: Path, steps: int, started: float) -> dict[str, float]:
    """From the start of the process (started: on the monotonic clock) to the first step, then `steps` more.

    All is imported and launched as `lora-diffusion train` does.

    Overhead is in CPU seconds all that a step takes beside the model's passes and the update: drawing its batch, in
    whichever thread, finding its captions' encodings, its line in the log and whatever else is due after it.
    """
    from lora_diffusion.config import TrainConfig
    from lora_diffusion.launch import lasting_imports
    from lora_diffusion.runs import RunFolder

    with lasting_imports():
        from lora_diffusion.recipe import build, make_accelerator
        from lora_diffusion.training.quiet_step import QuietStep
        from lora_diffusion.training_run import compiler_if_wanted

    settings = TrainConfig.load(config, [])
    accelerator = make_accelerator(settings)
    imported = time.process_time()
    run = RunFolder(settings.run.output)
    run.path.mkdir(parents=True, exist_ok=True)
    computing: list[float] = []
    QuietStep.__call__ = _timed(QuietStep.__call__, computing)
    with compiler_if_wanted(settings, accelerator):
        trainer: Any = build(settings, run, accelerator, resume=False)
        run.begin(0, settings.run.steps or 0)
        trainer.begin()
        start_wall, start_cpu = time.monotonic() - started, time.process_time()
        trainer.train_step()
        for _ in range(WARM_UPS if steps else 0):
            trainer.train_step()
        computing.clear()
        cpu = time.process_time()
        for _ in range(steps):
            trainer.train_step()
        cpu = time.process_time() - cpu
    assert len(computing) == steps, "steps are launched another way than is measured here"
    return {
        "start_wall_s": start_wall,
        "start_cpu_s": start_cpu,
        "import_cpu_s": imported,
        "step_cpu_s": cpu / steps if steps else 0.0,
        "overhead_cpu_s": (cpu - sum(computing)) / steps if steps else 0.0,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _timed(call: Callable[..., T], spent: list[float]) -> Callable[..., T]:
    """The same, which notes the CPU seconds of the calling thread: there is one for the model."""

    def timed(*arguments: Any) -> T:
        before = time.thread_time()
        result = call(*arguments)
        spent.append(time.thread_time() - before)
        return result

    return timed


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("scan", "train"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--started", type=float, default=0.0)
    options = parser.parse_args()
    if options.what == "scan":
        print(json.dumps(scan(options.path, options.memory)))
    else:
        print(json.dumps(train(options.path, options.steps, options.started)))


if __name__ == "__main__":
    main()
