"""Steps per second and memory of this trainer on a GPU, by base, batch size and memory mode.

    python -m benchmarks.gpu --base sd15 sdxl --out benchmarks/results

Per case a whole training in this process, by `lora_diffusion.recipe` as `lora-diffusion train` builds it: the base with
the true architecture and random weights loaded, pictures and captions cached, then steps. The first ones, in which
kernels are chosen and the CUDA graph is captured, do not count. Memory is what torch's allocator held at most: "peak"
from the start of the case, encoding included, "steps" from the first step on; the CUDA context, about half a
gigabyte, comes on top.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.bases import write_base
from benchmarks.engine import hardware
from benchmarks.pictures import write_pictures
from benchmarks.trainers import Task, own_config
from lora_diffusion.config import TrainConfig
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.trainer import Trainer

NUM_WARM_UP = 8
OUTER = 'model.gradient_checkpointing = "outer"'
FULL = "model.gradient_checkpointing = true"


@dataclass(frozen=True)
class Case:
    """steps: that are timed. more: lines of the config."""

    name: str
    batch_size: int = 1
    steps: int = 100
    more: tuple[str, ...] = ()
    targets: str = "attention"


CASES = {
    "sd15": (
        Case("batch 1", steps=300),
        Case("batch 8", 8, steps=60),
        Case("checkpointing", steps=100, more=(FULL,)),
    ),
    "sdxl": (
        Case("batch 1", steps=60),
        Case("batch 4", 4, steps=25),
        Case("checkpointing", steps=25, more=(FULL,)),
        Case("int8, checkpointing", steps=15, more=(FULL, 'model.quantise = "int8"')),
        Case("NF4, checkpointing", steps=15, more=(FULL, 'model.quantise = "nf4"')),
    ),
    "reduced": (Case("batch 1", steps=20), Case("checkpointing", steps=10, more=(FULL,))),
}
SIZES = {"sd15": 512, "sdxl": 1024, "reduced": 128}
GB = 2**30


def measure(case: Case, task: Task, launch: Launch, profile: Path | None = None) -> dict[str, Any]:
    """One training. profile: where a table of the kernels of some steps is written."""
    _forget()
    started = time.perf_counter()
    config = TrainConfig.parse(own_config(task, case.targets, *case.more))
    run = RunFolder(config.run.output)
    run.path.mkdir(parents=True)
    trainer = build(config, run, make_accelerator(config), resume=False)
    if trainer.plan.launch != "eager":  # else it has its reasons
        trainer.plan = replace(trainer.plan, launch=launch)
    trainer.begin()
    _take_steps(trainer, 1)
    first_step_s = time.perf_counter() - started
    peaks = [_peak()]
    _take_steps(trainer, NUM_WARM_UP)
    before = time.perf_counter()
    _take_steps(trainer, case.steps)
    seconds = (time.perf_counter() - before) / case.steps
    peaks.append(_peak())
    if profile is not None:
        _profile(trainer, profile)
    trainer.end_steps()  # the training is left before its end
    return {
        "case": case.name,
        "launch": trainer.plan.launch,
        "batch_size": case.batch_size,
        "steps_per_s": 1 / seconds,
        "images_per_s": case.batch_size / seconds,
        "ms_per_step": 1000 * seconds,
        "steps_gb": peaks[1],
        "peak_gb": max(peaks),
        "first_step_s": first_step_s,
    }


def _take_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.train_step()
    _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float:
    """GB since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GB
    torch.cuda.reset_peak_memory_stats()
    return peak


def _profile(trainer: Trainer, path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with profile(activities=activities) as result:
        _take_steps(trainer, 3)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=110))


def table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = ["| base | case | steps/s | images/s | steps GB | peak GB |", "| --- | --- | --- | --- | --- | --- |"]
    for base, records in results.items():
        for record in records:
            if "error" in record:
                lines.append(f"| {base} | {record['case']} | {record['error']} | | | |")
                continue
            lines.append(
                f"| {base} | {record['case']} | {record['steps_per_s']:.1f} | {record['images_per_s']:.1f} "
                f"| {record['steps_gb']:.2f} | {record['peak_gb']:.2f} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=CASES, default=["sd15", "sdxl"])
    parser.add_argument("--case", nargs="+", help="names of cases; else all")
    parser.add_argument("--launch", choices=("graph", "quiet", "eager"), default="graph")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="model.compile = true but in int8, NF4")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--profile", type=Path, help="folder for tables of the kernels of each case")
    parser.add_argument("--work", type=Path, default=Path(".cache/benchmarks"), help="where bases and pictures are put")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="gpu", help="of the result's file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    work = options.work.resolve()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.base:
        started = time.perf_counter()
        base = write_base(name, work / f"base-{name}")
        pictures = write_pictures(work / f"pictures-{options.pictures}-{SIZES[name]}", options.pictures, SIZES[name])
        print(f"{name}: base and pictures after {time.perf_counter() - started:.1f} s", flush=True)
        results[name] = []
        for case in CASES[name]:
            if options.case and case.name not in options.case:
                continue
            if options.compile and not any("quantise" in line for line in case.more):
                case = replace(case, name=f"{case.name}, compiled", more=(*case.more, "model.compile = true"))
            with tempfile.TemporaryDirectory() as folder:
                task = Task(base, False, pictures, SIZES[name], options.precision, case.batch_size, 10**6, Path(folder))
                profile = options.profile / f"{name}-{case.name}.txt".replace(" ", "-") if options.profile else None
                try:
                    results[name].append(measure(case, task, options.launch, profile))
                except Exception as error:  # one case that fails leaves the others
                    traceback.print_exc()
                    results[name].append({"case": case.name, "error": f"{type(error).__name__}: {error}"[:300]})
            print(json.dumps(results[name][-1]), flush=True)
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "diffusers": diffusers.__version__,
        },
        "precision": options.precision,
        "launch": options.launch,
        "cases": {name: [asdict(case) for case in CASES[name]] for name in options.base},
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
