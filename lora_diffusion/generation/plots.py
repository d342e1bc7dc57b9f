"""A picture of a run's numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAW = "#8fb3d9"
SMOOTH = "#1f5fa8"
VALIDATION = "#c2571a"
RATE = "#5b6770"
TEXT = "#2b2e33"
GRID = "#e4e4e0"
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that the colour-blind tell apart (Okabe & Ito 2008), without the yellow, which is faint on white."""
LINES = ("-", ":", "-.")

WIDTH_PX, HEIGHT_PX, DPI = 900, 520, 100

_SMOOTHING_FRACTION = 0.04  # of the curve's points, as the half-life of the moving average


def loss_plot(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Write a 900 px PNG: loss (each step faint, moving average strong), validation loss, learning rate below.

    metrics: lines of metrics.jsonl in order; those without `loss` or `val_loss` count for neither curve. Values that
    are not finite are left out. Raises ValueError when no line has a loss.
    """
    steps, losses = series(metrics, "loss")
    if not steps:
        raise ValueError("no line of the metrics has a loss to draw")
    figure = _new_figure()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_losses(top, steps, losses, metrics)
    _draw_rates(bottom, metrics)
    if title:
        top.set_title(title, loc="left", fontsize=12, color=TEXT, fontweight="bold")
    for axes in (top, bottom):
        _style(axes)
    _count_steps(bottom)
    _write(figure, path)


def losses_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str = "") -> None:
    """Write a 900 px PNG of several runs' losses: moving averages, and validation losses dashed.

    curves: label → lines of metrics.jsonl in order. Raises ValueError when none has a loss.
    """
    losses = {label: series(metrics, "loss") for label, metrics in curves.items()}
    if not any(steps for steps, _ in losses.values()):
        raise ValueError("no line of the metrics has a loss to draw")
    figure = _new_figure()
    axes = figure.subplots()
    for number, (label, (steps, values)) in enumerate(losses.items()):
        colour, line = RUNS[number % len(RUNS)], LINES[number // len(RUNS) % len(LINES)]
        averages = smooth(values, max(1.0, len(values) * _SMOOTHING_FRACTION))
        marker = "o" if len(steps) < 3 else ""
        axes.plot(steps, averages, color=colour, linestyle=line, linewidth=1.8, marker=marker, label=label)
        measured, validation = series(curves[label], "val_loss")
        if measured:
            name = f"{label}, validation"
            axes.plot(measured, validation, color=colour, linewidth=1, linestyle="--", marker="o", ms=3, label=name)
    if title:
        axes.set_title(title, loc="left", fontsize=12, color=TEXT, fontweight="bold")
    axes.set_ylabel("loss, smoothed", color=TEXT)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=TEXT)
    _style(axes)
    _count_steps(axes)
    _write(figure, path)


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of the lines that have `key`."""
    found = [(int(line["step"]), float(line[key])) for line in metrics if line.get(key) is not None]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def _new_figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it keeps global state and picks a display
    return figure


def _count_steps(axes: Axes) -> None:
    axes.set_xlabel("step", color=TEXT)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)


def _write(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_bytes_atomically(path, file.getvalue())


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average without a start-up bias: after `half_life` points a value counts half."""
    decay = 0.5 ** (1 / max(half_life, 1e-9))
    total = weight = 0.0
    averages: list[float] = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return averages


def _draw_losses(axes: Axes, steps: list[int], losses: list[float], metrics: Sequence[Mapping[str, Any]]) -> None:
    marker = "o" if len(steps) < 3 else ""
    axes.plot(steps, losses, color=RAW, linewidth=0.8, alpha=0.6, label="loss", marker=marker, markersize=3)
    averages = smooth(losses, max(1.0, len(losses) * _SMOOTHING_FRACTION))
    axes.plot(steps, averages, color=SMOOTH, linewidth=2, label="loss, smoothed")
    validation_steps, validation = series(metrics, "val_loss")
    if validation:
        axes.plot(
            validation_steps, validation, color=VALIDATION, linewidth=1.2, marker="o", markersize=4, label="validation"
        )
    axes.set_ylim(*_limits(losses, averages + validation))
    axes.set_ylabel("loss", color=TEXT)
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT, loc="upper right", ncols=3)


def _draw_rates(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    steps, rates = series(metrics, "lr")
    axes.plot(steps, rates, color=RATE, linewidth=1.5)
    axes.set_ylim(0, max(rates, default=0) * 1.15 or 1)
    axes.set_ylabel("lr", color=TEXT)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.locator_params(axis="y", nbins=3)


def _limits(losses: list[float], shown_whole: list[float]) -> tuple[float, float]:
    """Room for all of the strong curves and all but the highest 2 % of the faint one: single steps may be wild."""
    ordered = sorted(losses)
    high = max(ordered[math.ceil(0.98 * len(ordered)) - 1], *shown_whole)
    low = min(ordered[0], *shown_whole)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + 2 * room  # the legend's line lies on top


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
