"""Pictures of numbers per block of the UNet: bars for one number each, heat maps for pairs of adapters."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Matrix = Sequence[Sequence[float]]

COLORS = ("#1f5fa8", "#c2571a", "#3f8f6b", "#8e6bbf", "#c9a227", "#6fa8dc", "#a83254", "#7a8288")
"""One per panel of bars; they begin again after the last."""

TEXT = "#2b2e33"
GRID = "#e4e4e0"
DPI = 100

_OUTER = {"conv_in": "in", "conv_out": "out", "time_embedding": "time", "add_embedding": "time"}
_ORDER = ("time", "in", "down", "mid", "up", "out", "text")
_WIDTH_PX = 900  # of the narrowest chart
_MAX_NUMBERED = 12  # adapters; with more, numbers no longer fit into a heat map's cells


def block_of(name: str) -> str:
    """The block that a module belongs to, by its name in adapter files with the block names of diffusers.

    "down 1.0" is the first layer of the second block, resnet and attention together, and "down 1 sampler" its
    downsampler; also "mid", "up 2.1", "in", "out", "time", "text 1" and "text 2". Raises ValueError for other names.
    """
    if match := re.match(r"lora_te([12]?)_", name):
        return f"text {match[1] or 1}"
    path = name.removeprefix("lora_unet_")
    if match := re.match(r"(down|up)_blocks_(\d+)_(?:resnets|attentions)_(\d+)_", path):
        return f"{match[1]} {match[2]}.{match[3]}"
    if match := re.match(r"(down|up)_blocks_(\d+)_(?:down|up)samplers_", path):
        return f"{match[1]} {match[2]} sampler"
    if path.startswith("mid_block_"):
        return "mid"
    for start, block in _OUTER.items():
        if path == start or path.startswith(f"{start}_"):
            return block
    raise ValueError(f"{name} is no module of a Stable Diffusion UNet or text encoder in diffusers names")


def in_order(blocks: Iterable[str]) -> list[str]:
    """Labels of `block_of`, each once, in the order in which a picture passes them; text encoders come last."""
    return sorted(set(blocks), key=_position)


def bar_panels(path: Path, title: str, panels: Mapping[str, Mapping[str, float]]) -> None:
    """Write a PNG with several numbers of one adapter, each in a bar chart of its own over the same blocks.

    panels: the number's name → block → value; blocks as `block_of` calls them. A value that is missing or not finite
    has no bar. Raises ValueError when there is nothing to draw.
    """
    blocks = in_order(block for values in panels.values() for block in values)
    if not blocks:
        raise ValueError("there is no block to draw")
    figure = _figure(max(_WIDTH_PX, 110 + 26 * len(blocks)), 90 + 240 * len(panels))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=TEXT, fontweight="bold")
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flat
    for number, (axes, (name, values)) in enumerate(zip(rows, panels.items(), strict=True)):
        _draw_bars(axes, blocks, values, name, COLORS[number % len(COLORS)])
    _name_blocks(rows[-1], blocks)
    figure.align_ylabels()
    _save(figure, path)


def _draw_bars(axes: Axes, blocks: Sequence[str], values: Mapping[str, float], value_name: str, color: str) -> None:
    shown = [(at, values[block]) for at, block in enumerate(blocks) if math.isfinite(values.get(block, math.nan))]
    axes.bar([at for at, _ in shown], [value for _, value in shown], width=0.77, color=color)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    for at in range(1, len(blocks)):
        if _stretch(blocks[at]) != _stretch(blocks[at - 1]):
            axes.axvline(at - 0.5, color=GRID, linewidth=0.8)
    axes.set_ylabel(value_name, color=TEXT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _name_blocks(axes: Axes, blocks: Sequence[str]) -> None:
    if len(blocks) > 10:
        axes.set_xticks(range(len(blocks)), blocks, rotation=90)
    else:
        axes.set_xticks(range(len(blocks)), blocks, va="baseline")
        axes.tick_params(axis="x", pad=14)


def heat_map(
    path: Path, title: str, labels: Sequence[str], whole: Matrix, by_block: Mapping[str, Matrix] | None = None
) -> None:
    """Write a PNG of a number in [-1, 1] for each pair of adapters: over all layers large, and small for each block.

    labels: the adapters' names. whole and the matrices of by_block: (adapters, adapters). A value that is not finite
    leaves its cell grey. Raises ValueError when a matrix has another size.
    """
    by_block = by_block or {}
    size = len(labels)
    if not size or any(len(m) != size or any(len(row) != size for row in m) for m in (whole, *by_block.values())):
        raise ValueError(f"the matrices should have {size} rows and columns, one per label")
    blocks = in_order(by_block)
    num_columns = min(9, len(blocks)) or 1
    num_rows = math.ceil(len(blocks) / num_columns)
    upper_px, lower_px = min(500, 260 + 40 * len(labels)), 112 * num_rows + 34
    figure = _figure(_WIDTH_PX, upper_px + (lower_px if blocks else 0))
    upper, lower = figure, None
    if blocks:
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(upper_px, lower_px)).flat
    axes = upper.subplots()
    image = _draw_matrix(axes, whole)
    names = [_short(label) for label in labels]
    are_long = max(len(name) for name in names) * len(names) > 44
    axes.set_yticks(range(len(labels)), names)
    axes.set_xticks(range(len(labels)), names, rotation=35 if are_long else 0, ha="right" if are_long else "center")
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    if len(labels) <= _MAX_NUMBERED:
        _write_numbers(axes, whole)
    upper.suptitle(title, x=0.01, ha="left", fontsize=12, color=TEXT, fontweight="bold")
    axes.set_anchor("W")
    bar = upper.colorbar(image, cax=axes.inset_axes((1.06, 0.1, 0.045, 0.8)), ticks=(-1, -0.5, 0, 0.5, 1))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=TEXT, labelsize=9, length=0)
    if lower is not None:
        lower.suptitle("by block, in the same order", x=0.01, ha="left", fontsize=10, color=TEXT)
        for place, block in zip(lower.subplots(num_rows, num_columns, squeeze=False).flat, blocks, strict=False):
            _draw_matrix(place, by_block[block])
            place.set_title(block, fontsize=8, color=TEXT, pad=3)
            place.set_xticks([])
            place.set_yticks([])
        for place in lower.axes[len(blocks) :]:
            place.set_axis_off()
    _save(figure, path)


def _figure(width_px: int, height_px: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)  # no pyplot: it keeps global state and picks a display
    return figure


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_bytes_atomically(path, file.getvalue())


def _draw_matrix(axes: Axes, matrix: Matrix) -> AxesImage:
    """Blue below zero, white at zero, red above: two colours that colour-blind readers tell apart."""
    from matplotlib import colormaps

    image = axes.imshow(matrix, cmap=colormaps["RdBu_r"].with_extremes(bad="#c8c8c4"), vmin=-1, vmax=1)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return image


def _write_numbers(axes: Axes, matrix: Matrix) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            if math.isfinite(value):
                color = "white" if abs(value) > 0.65 else TEXT
                text = f"{value:.2f}".replace("-0.00", "0.00")
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)


def _short(label: str, length: int = 24) -> str:
    """The name without matplotlib's markup ("$", a leading "_" hides it), its middle left out if it is long."""
    label = label.replace("$", r"\$")
    label = f" {label}" if label.startswith("_") else label
    return label if len(label) <= length else f"{label[: length // 2]}…{label[-(length // 2 - 1) :]}"


def _stretch(block: str) -> str:
    """The blocks drawn together: "down 1" for "down 1.0"."""
    return block.replace(".", " ").rpartition(" ")[0] or block


def _position(block: str) -> tuple[int, list[float]]:
    first, _, rest = block.partition(" ")
    numbers = [math.inf if step == "sampler" else float(step) for step in re.split(r"[. ]", rest) if step]
    return _ORDER.index(first), numbers
