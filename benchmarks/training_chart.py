"""The results of `benchmarks.training` as a table and a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK, OURS, THEIRS = "#2b2e33", "#1f5fa8", "#b9bcc2"
PANELS = (
    ("wall_s_per_step", "Seconds per step", "{:.2f}"),
    ("run_wall_s", "Whole run, seconds", "{:.0f}"),
    ("peak_mb", "Peak memory, MB", "{:.0f}"),
)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one row per trainer, and how many times longer each peer takes on the same layers; then the parity."""
    lines = [
        f"{result['base']}, {result['pixels']} px, {result['precision']}, batch {result['batch_size']}, "
        f"{result['hardware']}, {result['date']}",
        "",
        "| trainer | s per step | CPU s per step | whole run s | peak MB | per step | per step, CPU | whole run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in result["trainers"]:
        ratio = result["ratios"].get(record["trainer"])
        keys = ("wall_s_per_step", "cpu_s_per_step", "run_wall_s")
        compared = " | ".join(f"{ratio[key]:.2f}x" if ratio else "" for key in keys)
        lines.append(
            f"| {record['trainer']} | {record['wall_s_per_step']:.3f} | {record['cpu_s_per_step']:.3f} "
            f"| {record['run_wall_s']:.0f} | {record['peak_mb']:.0f} | {compared} |"
        )
    if "parity" in result:
        lines += ["", parity_line(result["parity"], result["precision"])]
    return "\n".join(lines)


def parity_line(parity: Mapping[str, Any], precision: str) -> str:
    return (
        f"As measured ({precision}, {parity['num_packed']} packed convolutions) against plain float32, "
        f"{parity['steps']} steps with the same draws: the loss differs by at most {parity['loss']:.2%} "
        f"(mean of {parity['window']} steps), the gradient's norm by {parity['grad_norm']:.2%}; "
        f"the trained changes have a cosine of {parity['cosine']:.5f}."
    )


def draw_chart(path: Path, result: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    records = result["trainers"][::-1]
    names = [record["trainer"] for record in records]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    figure = Figure(figsize=(12, 0.9 + 0.5 * len(names)), dpi=110, layout="constrained")
    what = f"{result['base']}, {result['pixels']} px, {result['precision']}, batch {result['batch_size']}"
    title = f"Training a LoRA of rank 8 – {what} – {result['hardware']}, {result['date']}"
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    for axes, (key, label, form) in zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True):
        values = [record[key] for record in records]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, color=INK)
        axes.set(xlim=(0, 1.2 * max(values)))
        axes.set_title(label, fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e4e4e0")
        axes.set_axisbelow(True)
    figure.savefig(path)
