"""What many adapters cost the engine: memory and time with 1 to 200 loaded, and batches that mix eight of them.

    python -m benchmarks.engine --out benchmarks/results

On the shipped base, side by side in one process: every round measures each case once, in turn, so that whatever else
the machine does falls on all alike; medians of the rounds. Times are CPU seconds of one thread on a CPU (what others
run on the machine does not count), wall clock on a GPU. Writes engine.json and engine.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import diffusers
import psutil
import torch

from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.models.load import load_model

COUNTS = (1, 25, 50, 100, 200)
REQUEST = Request("a photo of a red house", seed=1, steps=4, cfg=7.0)
BATCH = 8
MB = 2**20


def write_adapters(source: Path, folder: Path, count: int) -> None:
    """Adapters of one shape and of different weights."""
    file = AdapterFile.read(source)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        modules = {
            name: {
                part: tensor * (1 + 0.2 * torch.randn((), generator=generator)) if part == "lora_up.weight" else tensor
                for part, tensor in parts.items()
            }
            for name, parts in file.modules.items()
        }
        AdapterFile(modules, family=file.family).write(folder / f"adapter-{number:03d}.safetensors")


def measure(cases: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each case, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, draw in cases.items():
            started = clock()
            draw()
            if number:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def requests(names: list[str], count: int) -> list[Request]:
    """`count` pictures with these adapters in turn; no names is the base alone."""
    used = [{names[i % len(names)]: 1.0} if names else {} for i in range(count)]
    return [
        Request(REQUEST.prompt, seed=i, steps=REQUEST.steps, cfg=REQUEST.cfg, adapters=used[i]) for i in range(count)
    ]


def measure_loaded(base: str, folder: Path, rounds: int, device: torch.device) -> list[dict[str, float]]:
    """One picture with one adapter, while more and more are loaded. A model apart for each count, drawn in turn."""
    rows: list[dict[str, float]] = []
    engines: dict[int, Engine] = {}
    process = psutil.Process()
    for count in COUNTS:
        engine = Engine(load_model(base, device=device))
        library = AdapterLibrary(engine, [folder], budget_bytes=2**40)
        before, started = process.memory_info().rss, clock_of(device)()
        names = sorted(library.paths)[:count]
        library.need(names)
        rows.append(
            {
                "loaded": count,
                "weights_mb": sum(engine.adapter_bytes.values()) / MB,
                "process_mb": (process.memory_info().rss - before) / MB,
                "load_ms_each": 1000 * (clock_of(device)() - started) / count,
            }
        )
        engines[count] = engine
        started = clock_of(device)()
        engine.unload_adapter(names[-1])
        rows[-1]["unload_ms"] = 1000 * (clock_of(device)() - started)
        library._held.pop(names[-1])
        library.need(names)
    picture = requests(["adapter-000"], 1)
    cases = {str(count): lambda engine=engine: engine.generate(picture) for count, engine in engines.items()}
    seconds = measure(cases, rounds, clock_of(device))
    return [row | {"picture_s": seconds[str(int(row["loaded"]))]} for row in rows]


def measure_mixes(base: str, folder: Path, rounds: int, device: torch.device) -> dict[str, float]:
    """A batch of eight: the base alone, one adapter, eight different ones, and eight stacks of two."""
    engine = Engine(load_model(base, device=device), batch_size=BATCH)
    library = AdapterLibrary(engine, [folder], budget_bytes=2**40)
    names = sorted(library.paths)[:BATCH]
    library.need(names)
    pairs = [
        Request(r.prompt, seed=r.seed, steps=r.steps, cfg=r.cfg, adapters={names[i]: 0.6, names[(i + 1) % BATCH]: 0.4})
        for i, r in enumerate(requests(names, BATCH))
    ]
    cases = {
        "base alone": lambda: engine.generate(requests([], BATCH)),
        "1 adapter for all": lambda: engine.generate(requests(names[:1], BATCH)),
        "8 different": lambda: engine.generate(requests(names, BATCH)),
        "8 different pairs": lambda: engine.generate(pairs),
    }
    return measure(cases, rounds, clock_of(device))


def clock_of(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def draw_chart(path: Path, loaded: list[dict[str, float]], mixes: Mapping[str, float], subtitle: str) -> None:
    from matplotlib.figure import Figure

    ink, blue, orange = "#2b2e33", "#1f5fa8", "#c2571a"
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"Adapters in the engine – {subtitle}", color=ink, fontsize=11, x=0.01, ha="left")
    memory, speed, mixed = figure.subplots(1, 3)
    counts = [row["loaded"] for row in loaded]
    memory.plot(counts, [row["process_mb"] for row in loaded], "o-", color=orange, label="process")
    memory.plot(counts, [row["weights_mb"] for row in loaded], "o-", color=blue, label="weights alone")
    memory.set(title="Memory added", xlabel="adapters loaded", ylabel="MB")
    memory.legend(frameon=False)
    speed.plot(counts, [1000 * row["picture_s"] for row in loaded], "o-", color=blue)
    speed.set(title="One picture with one adapter", xlabel="adapters loaded", ylabel="ms")
    first = mixes["1 adapter for all"]
    bars = mixed.barh(list(mixes)[::-1], [1000 * value for value in mixes.values()][::-1], color=blue)
    mixed.bar_label(bars, [f"{value / first:.2f}x" for value in mixes.values()][::-1], padding=4, color=ink)
    mixed.set(title="A batch of 8 pictures", xlabel="ms", xlim=(0, 1200 * max(mixes.values())))
    for axes in (memory, speed, mixed):
        axes.set_ylim(bottom=0) if axes is not mixed else None
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is mixed else "y", color="#e4e4e0")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    figure.savefig(path)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"1 thread of {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="samples/base")
    parser.add_argument("--adapter", type=Path, default=Path("samples/adapters/ink.safetensors"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(arguments.adapter, folder, max(COUNTS))
        mixes = measure_mixes(arguments.base, folder, arguments.rounds, device)
        loaded = measure_loaded(arguments.base, folder, arguments.rounds, device)
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "base": Path(arguments.base).name,
        "picture": {"steps": REQUEST.steps, "cfg": REQUEST.cfg, "size": "the base's own"},
        "rounds": arguments.rounds,
        "loaded": loaded,
        "batch_of_8_s": mixes,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "engine.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_chart(arguments.out / "engine.png", loaded, mixes, f"{result['hardware']}, {result['date']}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
