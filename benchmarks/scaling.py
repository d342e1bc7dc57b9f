r"""What a data set's size costs: start, scan, steps and memory with 10 to 10,000 pictures.

    python -m benchmarks.scaling

Trains the base in samples/base on small pictures (64 px; each has a caption of its own), every start in a process of
its own, first without a cache, then again with it. Photographs cost more to read than these: how many are read per
second is measured apart, on JPEGs and PNGs of 512 to 1024 px with the noise and gradients of photographs.

Charts and tables show CPU seconds of all threads, which depend less than wall clock on what else the machine does; the
JSON file has both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
from PIL import Image

from benchmarks.engine import hardware
from benchmarks.pictures import COLOURS
from lora_diffusion.data.file_facts import SETTLED_NS

PHOTO_SIZES = ((512, 512), (768, 512), (640, 960), (1024, 768), (1024, 1024))
INK, COLD, WARM, OTHER = "#2b2e33", "#c2571a", "#1f5fa8", "#6b8e23"


def write_photos(folder: Path, count: int, suffix: str) -> Path:
    """`count` pictures that compress like photographs: about 1.2 bits per pixel as JPEG, 12 as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05d}{suffix}"
        if path.exists():
            continue
        width, height = PHOTO_SIZES[number % len(PHOTO_SIZES)]
        pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
        for cells, strength in ((4, 60), (16, 22), (64, 9), (256, 3.5)):
            coarse = generator.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
            wave = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(wave, dtype=np.float32) - 128) * (strength / 64)
        pixels += generator.normal(0, 2.5, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"a photo of {COLOURS[number % 6]} thing {number}")
    return folder


def write_small(folder: Path, count: int) -> Path:
    """`count` PNGs of 64 x 64 and 96 x 64 px, each with a caption of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        size = (64, 64) if number % 3 else (96, 64)
        path = folder / f"{number:05d}.png"
        if not path.exists():
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
            path.with_suffix(".txt").write_text(f"a {COLOURS[number % 6]} picture of shape {number}, at night")
    return folder


def write_config(folder: Path, pictures: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(
        f'run = {{ name = "scaling", output = "{folder.as_posix()}/run", steps = 10000, batch_size = 2, seed = 1, '
        f'precision = "fp32", device = "cpu", save_every = 0 }}\n'
        'model.path = "samples/base"\nadapter.rank = 8\npreview.every = 0\n'
        f'cache.folder = "{folder.as_posix()}/cache"\n'
        f'[[dataset]]\npath = "{pictures.as_posix()}"\nresolution = 64\n'
    )
    return path


def worker(*arguments: str) -> dict[str, float]:
    """Raises SystemExit with the end of the output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.scaling_worker", *arguments, "--started", str(time.monotonic())]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{(result.stdout + result.stderr)[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_photos(work: Path, count: int) -> dict[str, dict[str, float]]:
    """Pictures per CPU second when a folder of photographs is read for the first time, and again."""
    rows: dict[str, dict[str, float]] = {}
    for suffix in (".jpg", ".png"):
        folder = write_photos(work / f"photos-{count}{suffix}", count, suffix)
        time.sleep(SETTLED_NS / 1e9)
        memory = work / "photo-facts"
        shutil.rmtree(memory, ignore_errors=True)
        cold, warm = (worker("scan", str(folder), "--memory", str(memory)) for _ in range(2))
        size = sum(path.stat().st_size for path in folder.glob(f"*{suffix}")) / count
        rows[suffix] = {
            "kilobytes": size / 1000,
            "first_per_cpu_s": count / cold["cpu_s"],
            "again_per_cpu_s": count / warm["cpu_s"],
        }
        print(f"photos {suffix}: {rows[suffix]}", flush=True)
    return rows


def measure(work: Path, count: int, steps: int) -> dict[str, Any]:
    pictures = write_small(work / f"small-{count}", count)
    time.sleep(SETTLED_NS / 1e9)
    folder = work / f"run-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = write_config(folder, pictures)
    facts = ("scan", str(pictures), "--memory", str(folder / "facts"))
    record: dict[str, Any] = {"images": count}
    for name in ("cold", "warm"):
        record[f"scan_{name}"] = worker(*facts)
        record[name] = worker("train", str(config), "--steps", str(steps if name == "warm" else 0))
        time.sleep(SETTLED_NS / 1e9)
        print(f"{count} {name}: {record[f'scan_{name}']} {record[name]}", flush=True)
    return record


def draw_chart(path: Path, result: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    records: Sequence[Mapping[str, Any]] = result["data_sets"]
    counts = [record["images"] for record in records]
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    title = f"The size of the data set – {result['hardware']}, {result['date']}"
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    start, step, memory = figure.subplots(1, 3)
    for name, colour in (("cold", COLD), ("warm", WARM)):
        what = "nothing cached" if name == "cold" else "all cached"
        start.plot(counts, [r[name]["start_cpu_s"] for r in records], "o-", color=colour, label=f"to step 1, {what}")
        start.plot(counts, [r[f"scan_{name}"]["cpu_s"] for r in records], "s--", color=colour, label=f"scan, {what}")
        memory.plot(counts, [r[name]["peak_mb"] for r in records], "o-", color=colour, label=what)
    start.set(title="Start, CPU seconds", xscale="log", yscale="log")
    whole = [1000 * r["warm"]["step_cpu_s"] for r in records]
    step.plot(counts, whole, "o-", color=OTHER, label="whole step")
    own = [1000 * r["warm"]["overhead_cpu_s"] for r in records]
    step.plot(counts, own, "o-", color=WARM, label="batch, captions, log")
    step.set(title="One step, CPU milliseconds", xscale="log", yscale="log")
    memory.set(title="Peak memory, MB", xscale="log", ylim=(0, 1.6 * max(r["cold"]["peak_mb"] for r in records)))
    for axes in (start, step, memory):
        axes.set_xlabel("pictures")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e0")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    figure.savefig(path)


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| pictures | scan, first | scan, again | start, first | start, again | step | of it overhead | peak MB, first "
        "| peak MB, again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["data_sets"]:
        cold, warm = r["cold"], r["warm"]
        lines.append(
            f"| {r['images']:,} | {r['scan_cold']['cpu_s']:.2f} s | {r['scan_warm']['cpu_s']:.2f} s "
            f"| {cold['start_cpu_s']:.1f} s | {warm['start_cpu_s']:.1f} s | {1000 * warm['step_cpu_s']:.0f} ms "
            f"| {1000 * warm['overhead_cpu_s']:.1f} ms | {cold['peak_mb']:.0f} | {warm['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=(10, 100, 1000, 10_000))
    parser.add_argument("--steps", type=int, default=40, help="after those that warm up, with everything cached")
    parser.add_argument("--photos", type=int, default=150, help="of each kind")
    parser.add_argument("--work", type=Path, default=Path(".cache/benchmarks/scaling"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    work = options.work.resolve()
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(torch.device("cpu")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "pillow": PIL.__version__,
        },
        "steps": options.steps,
        "photos": {"count": options.photos} | measure_photos(work, options.photos),
        "data_sets": [measure(work, count, options.steps) for count in options.counts],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_chart(options.out / "scaling.png", result)
    print(table(result))


if __name__ == "__main__":
    main()
