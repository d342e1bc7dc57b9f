"""What `merge`, `extract` and `bake` did, as tables for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lora_diffusion.tools.bake import BakeReport
from lora_diffusion.tools.extract import ExtractReport, kept_by_part
from lora_diffusion.tools.merge import MergeReport
from lora_diffusion.tools.plain_lora import PARTS, dotted_name, part_of

_NUM_WORST = 10
_ROUNDING_WORTH_A_WARNING = 0.03
"""Share of a change that the rounding of a 16-bit base may take before a picture can show it."""


def render_merge(report: MergeReport, console: Console | None = None) -> None:
    console = console or Console()
    table = _table()
    for file, weight in report.adapters:
        kinds = ", ".join(f"{count} {kind}" for kind, count in file.kinds.items())
        ranks = _range([geometry.rank for geometry in file.geometries.values()])
        name = file.path.name if file.path else ""
        table.add_row(f"{weight:g} ×", f"{escape(name)}: {kinds}, rank {ranks}, {file.format} names")
    chosen = ", the largest of the inputs" if report.is_rank_chosen else ""
    table.add_row("method", report.method + (f", shortened to rank {report.rank}{chosen}" if report.rank else ""))
    modules, ranks = report.modules, _range([module.rank for module in report.modules])
    table.add_row("result", f"{_by_part([module.name for module in modules])}; rank {ranks}")
    table.add_row("stored as", _precision(report.precision) + _rounding([module.rounding for module in modules]))
    errors = [module.error for module in modules]
    if report.method == "concat":
        table.add_row("error", "none: the factors of all adapters are kept side by side")
    else:
        table.add_row(
            "error", f"{max(errors):.2%} at most, {sum(errors) / len(errors):.2%} on average, of a module's change"
        )
    console.print(table)
    if report.method != "concat":
        _render_worst(console, [(module.name, module.rank, module.error) for module in modules])
    _render_notes(console, report.notes)
    console.print(str(report.out), markup=False, highlight=False)


def render_extract(report: ExtractReport, console: Console | None = None) -> None:
    console = console or Console()
    table = _table("part", "layers", "rank", "kept of its change")
    for part, kept in kept_by_part(report.layers).items():
        members = [layer for layer in report.layers if part_of(layer.name) == part]
        table.add_row(part, str(len(members)), _range([layer.rank for layer in members]), _share(kept))
    console.print(table)
    if report.num_same:
        console.print(f"{report.num_same} layers are the same in both models and were left out.")
    _render_worst(console, [(layer.name, layer.rank, layer.error) for layer in report.layers])
    if report.unheld:
        console.print("\n[bold yellow]Differences that no adapter holds[/]")
        lost = _table("what", "tensors", "of the whole squared change")
        for entry in report.unheld:
            lost.add_row(entry.what, str(entry.count), _share(entry.squared / report.squared))
        console.print(lost)
    console.print(
        f"\nThe file holds {_share(report.energy)} of the whole squared change, as {_precision(report.precision)}."
    )
    _render_notes(console, report.notes)
    console.print(str(report.out), markup=False, highlight=False)


def render_bake(report: BakeReport, console: Console | None = None) -> None:
    console = console or Console()
    table = _table()
    table.add_row("layers changed", _by_part([layer.name for layer in report.layers]))
    largest = max(report.layers, key=lambda layer: layer.relative_change)
    table.add_row(
        "largest change", f"{largest.relative_change:.1%} of the weight's size: {escape(dotted_name(largest.name))}"
    )
    coarse = [layer for layer in report.layers if layer.dtype.itemsize < 4]
    if coarse:
        worst = max(coarse, key=lambda layer: layer.rounding)
        table.add_row(
            "lost by rounding",
            f"{report.rounding:.2%} of the change in all, {worst.rounding:.2%} in {escape(dotted_name(worst.name))} "
            f"({_precision(worst.dtype)})",
        )
    console.print(table)
    if coarse and report.rounding > _ROUNDING_WORTH_A_WARNING:
        console.print(
            f"[bold yellow]The base's {_precision(coarse[0].dtype)} weights are coarse for this change: pictures may "
            "differ from those drawn with the adapters. Bake into a float32 or float16 copy of the base.[/]"
        )
    _render_notes(console, report.notes)
    console.print(str(report.out), markup=False, highlight=False)


def _table(*headings: str) -> Table:
    return Table(*(Column(heading, overflow="fold") for heading in headings), show_header=bool(headings), box=None)


def _render_worst(console: Console, modules: Sequence[tuple[str, int, float]]) -> None:
    """modules: (canonical name, rank, relative error)."""
    table = _table("error", "rank", "least well kept")
    for name, rank, error in sorted(modules, key=lambda module: -module[2])[:_NUM_WORST]:
        table.add_row(f"{error:.2%}", str(rank), escape(dotted_name(name)))
    console.print(table)


def _render_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)


def _by_part(names: Sequence[str]) -> str:
    counts = Counter(part_of(name) for name in names)
    return ", ".join(f"{counts[part]} in {part}" for part in PARTS if counts[part])


def _range(ranks: Sequence[int]) -> str:
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _rounding(errors: Sequence[float]) -> str:
    return f", which rounds a module's change by {max(errors):.2g} at most" if max(errors) else ""


def _precision(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share(value: float) -> str:
    """Per cent with as many digits as tell it from 0 and 100."""
    if not 0 < value < 1:
        return f"{value:.0%}"
    digits = max(1, math.ceil(-math.log10(min(value, 1 - value))) - 1)
    return f"{100 * value:.{min(digits, 6)}f}%"
