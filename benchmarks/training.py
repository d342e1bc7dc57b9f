r"""How fast LoRA training is, side by side with diffusers' script and sd-scripts in one run.

    python -m benchmarks.training --base sd15 --precision bf16 --threads 1 \
        --diffusers PATH --diffusers-python PATH --sd-scripts PATH --sd-scripts-python PATH

The paths are checkouts of huggingface/diffusers and kohya-ss/sd-scripts, and the Python interpreters of environments
in which their scripts run; without them this trainer is measured alone. The base has the true architecture and random
weights. Every trainer runs from start to end twice, with few and with many steps, as a process of its own: seconds per
step are the difference in time over the difference in steps, so start, caching and warm-up do not count; the whole run
is the longer one. The trainers take turns, and that repeats `--rounds` times; medians are reported.

Speed at the price of another result would be none. So at the end some steps are trained with the same draws twice, as
measured and by the plain path (`benchmarks.parity`), and how far losses, gradients and the trained change are apart is
reported; in float32, SD 1.5 needs 6 GB for that. `--no-parity` leaves it out.

CPU seconds are of all threads of the process; where other programs use the machine too, they say more than wall clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.bases import SIZES, write_base
from benchmarks.engine import hardware
from benchmarks.parity import compare_paths
from benchmarks.pictures import write_pictures
from benchmarks.trainers import Task, Trainer, diffusers_script, own, sd_scripts
from benchmarks.training_chart import draw_chart, table

T = TypeVar("T")

PEERS = {"diffusers": "ours, attention", "sd-scripts": "ours, attention-mlp"}
"""Which of our measurements trains the same layers as the other trainer."""
PARITY_STEPS = {"sd15": 6, "reduced": 50, "sdxl": 6}


@dataclass(frozen=True)
class Run:
    """One process from start to end: seconds, and the most memory it held. gpu_mb: of the device, 0 without one."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    gpu_mb: float


def run_once(trainer: Trainer, task: Task, threads: int) -> Run:
    """Raises SystemExit with the end of the output if the trainer fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(task.folder / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    arguments = trainer.arguments(task)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            arguments, cwd=trainer.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        gpu = GpuMemory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{trainer.name} failed:\n{output.read().decode(errors='replace')[-4000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, gpu.peak_mb())


class GpuMemory:
    """The most memory that a process had on the GPU, asked for four times a second; nothing on a machine without."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._is_over = str(pid), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            self._thread.start()

    def peak_mb(self) -> float:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        return self._peak

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while not self._is_over.wait(0.25):
            lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
            used = [float(line.split(",")[1]) for line in lines if line.split(",")[0].strip() == self._pid]
            self._peak = max([self._peak, *used])


def measure(trainers: Sequence[Trainer], task: Task, lengths: tuple[int, int], threads: int, rounds: int) -> list[Any]:
    """One record per trainer: seconds per step, whole run and memory, as medians, and every run they come from."""
    runs: dict[str, list[tuple[Run, Run]]] = {trainer.name: [] for trainer in trainers}
    for number in range(rounds):
        for trainer in trainers:
            pair: list[Run] = []
            for steps in lengths:
                with tempfile.TemporaryDirectory() as folder:
                    pair.append(run_once(trainer, replace(task, steps=steps, folder=Path(folder)), threads))
                print(f"round {number + 1}  {trainer.name}, {steps} steps: {pair[-1]}", flush=True)
            runs[trainer.name].append((pair[0], pair[1]))
    return [{"trainer": name} | summary(pairs, lengths) for name, pairs in runs.items()]


def summary(pairs: Sequence[tuple[Run, Run]], lengths: tuple[int, int]) -> dict[str, Any]:
    rounds = [_of_round(short, long, lengths) for short, long in pairs]
    return {
        **{key: statistics.median(times[key] for times in rounds) for key in rounds[0]},
        "peak_mb": max(run.peak_mb for pair in pairs for run in pair),
        "gpu_mb": max(run.gpu_mb for pair in pairs for run in pair),
        "runs": [[asdict(run) for run in pair] for pair in pairs],
    }


def _of_round(short: Run, long: Run, lengths: tuple[int, int]) -> dict[str, float]:
    num_steps = lengths[1] - lengths[0]
    return {
        "wall_s_per_step": (long.wall_s - short.wall_s) / num_steps,
        "cpu_s_per_step": (long.cpu_s - short.cpu_s) / num_steps,
        "run_wall_s": long.wall_s,
        "run_cpu_s": long.cpu_s,
    }


def ratios(records: Sequence[dict[str, Any]], lengths: tuple[int, int]) -> dict[str, dict[str, float]]:
    """How many times longer each peer takes than this trainer on the same layers; of memory, how many times more.

    Of times it is the median over the rounds, each with its own: a shared machine may be half as fast an hour later.
    """
    by_name = {record["trainer"]: record for record in records}
    found: dict[str, dict[str, float]] = {}
    for peer, mine in PEERS.items():
        if peer not in by_name:
            continue
        theirs, ours = (
            [_of_round(Run(**short), Run(**long), lengths) for short, long in by_name[name]["runs"]]
            for name in (peer, mine)
        )
        found[peer] = {
            key: statistics.median(their[key] / our[key] for their, our in zip(theirs, ours, strict=True))
            for key in theirs[0]
        } | {"peak_mb": by_name[peer]["peak_mb"] / by_name[mine]["peak_mb"]}
    return found


def check_parity(task: Task, steps: int, threads: int) -> dict[str, Any]:
    """A `Parity` of `steps` steps of the task."""
    with tempfile.TemporaryDirectory() as folder:
        return in_own_process(compare_paths, replace(task, steps=steps, folder=Path(folder)), threads)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a call. Linux counts what this process held at most as held by the trainers that it starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SIZES, default="sd15")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, help="pixels; else 256 for sd15, 128 for reduced, 1024 for sdxl")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(5, 50), metavar=("FEW", "MANY"))
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-parity", dest="parity", action="store_false", help="no comparison with the plain path")
    parser.add_argument("--work", type=Path, default=Path(".cache/benchmarks"), help="where bases and pictures are put")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    for peer in ("diffusers", "sd-scripts"):
        parser.add_argument(f"--{peer}", type=Path, help=f"a checkout of {peer}")
        parser.add_argument(f"--{peer}-python", type=Path, help=f"the interpreter of an environment for {peer}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    size = options.size or SIZES[options.base]
    work = options.work.resolve()
    base = in_own_process(write_base, options.base, work / f"base-{options.base}")
    pictures = write_pictures(work / f"pictures-{options.pictures}-{size}", options.pictures, size)
    trainers = [own("attention")]
    if options.diffusers:
        trainers.append(diffusers_script(options.diffusers, options.diffusers_python.absolute()))
    if options.sd_scripts or not options.diffusers:
        trainers.append(own("attention-mlp"))
    if options.sd_scripts:
        trainers.append(sd_scripts(options.sd_scripts, options.sd_scripts_python.absolute()))
    task = Task(base, options.base == "reduced", pictures, size, options.precision, options.batch_size, 0, work)
    records = measure(trainers, task, tuple(options.steps), options.threads, options.rounds)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(device).replace("1 thread", f"{options.threads} thread{'s' * (options.threads > 1)}"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "base": options.base,
        "pixels": size,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "pictures": options.pictures,
        "rounds": options.rounds,
        "trainers": records,
        "ratios": ratios(records, tuple(options.steps)),
    }
    if options.parity:
        result["parity"] = check_parity(task, PARITY_STEPS[options.base], options.threads)
    name = f"training-{options.base}-{options.precision}-b{options.batch_size}-t{options.threads}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_chart(options.out / f"{name}.png", result)
    print(table(result))


if __name__ == "__main__":
    main()
