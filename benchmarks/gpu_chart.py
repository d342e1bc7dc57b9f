"""The results of `benchmarks.gpu`, beside those of diffusers' scripts, as a chart.

python -m benchmarks.gpu_chart benchmarks/results/gpu-h200.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.training_chart import INK, OURS, THEIRS

NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Steps per second at batch 1 on the left, memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    title = f"LoRA of rank {result['rank']}, {result['precision']} – {result['hardware']}, {result['date']}"
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    speed, memory = figure.subplots(1, 2)
    rows = [(record, colour, who) for record, colour, who in _speeds(result)]
    labels = [f"{NAMES[r['base']]}, {result['pixels'][r['base']]} px, {who}" for r, _, who in rows]
    bars = speed.barh(labels, [r["steps_per_s"] for r, _, _ in rows], color=[colour for _, colour, _ in rows])
    speed.bar_label(bars, [f"{r['steps_per_s']:.1f}" for r, _, _ in rows], padding=4, color=INK)
    speed.set_title("Steps per second, batch 1", fontsize=10, color=INK)
    cases = [(f"{NAMES[r['base']]}, {r['case']}", r["peak_gb"]) for r in reversed(result["ours"])]
    bars = memory.barh([name for name, _ in cases], [gb for _, gb in cases], color=OURS)
    memory.bar_label(bars, [f"{gb:.1f}" for _, gb in cases], padding=4, color=INK)
    memory.set_title("Memory on the card, GB", fontsize=10, color=INK)
    for axes in (speed, memory):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e4e4e0")
        axes.set_axisbelow(True)
    figure.savefig(path)


def _speeds(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, str]]:
    rows: list[tuple[Mapping[str, Any], str, str]] = []
    for base in reversed(NAMES):
        rows += [(record, THEIRS, "diffusers' script") for record in result["diffusers"] if record["base"] == base]
        ours = [record for record in result["ours"] if (record["base"], record["case"]) == (base, "batch 1")]
        rows += [(record, OURS, "this trainer") for record in ours]
    return rows


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
