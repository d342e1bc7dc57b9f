"""What the commands on adapter files print. Text from files is shown as text: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.tools.readers import Reading, Verdict

if TYPE_CHECKING:
    from lora_diffusion.tools.convert import Conversion
    from lora_diffusion.tools.inspect import Inspection, Spread
    from lora_diffusion.tools.overlap import Overlap
    from lora_diffusion.tools.resize import Resizing

_LONGEST = 160  # characters of a value from a file
_MOST_METADATA = 80
_WORST = 10
_STYLES = {Verdict.AS_TRAINED: "green", Verdict.UNKNOWN: "", Verdict.IN_PART: "yellow"}
_PARTS = {"lora_unet": "UNet", "lora_te": "text encoder", "lora_te1": "text encoder", "lora_te2": "text encoder 2"}


def shown(text: str, longest: int = _LONGEST) -> Text:
    """`text` from an untrusted source for a terminal: what does not print is escaped, what is long is cut."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: longest + 1])
    return Text(f"{plain[:longest]}… ({len(text):,} characters)" if len(plain) > longest else plain)


def print_inspection(report: Inspection) -> None:
    console = Console()
    _print_facts(console, _facts(report))
    _print_parts(console, report)
    _print_blocks(console, report)
    if report.metadata:
        entries = sorted(report.metadata.items())
        _print_facts(console, entries[:_MOST_METADATA], title="metadata")
        if len(entries) > _MOST_METADATA:
            console.print(f"… and {len(entries) - _MOST_METADATA} more (--json lists all)\n")
    _print_readers(console, report.readers)
    _print_notes(console, report.notes)
    if report.is_hash_false:
        _print_notes(console, ["sshs_model_hash is not that of these tensors: they were changed after it was written"])


def print_conversion(target: Path, conversion: Conversion) -> None:
    console = Console()
    before, after = conversion.formats
    _print_facts(
        console,
        [
            ("written", str(target)),
            ("modules", f"{conversion.num_modules}, {before} → {after}"),
            ("size", " → ".join(_size(count) for count in conversion.bytes)),
        ],
    )
    _print_readers(console, conversion.readers)
    _print_notes(console, conversion.notes)


def print_resizing(target: Path, resizing: Resizing) -> None:
    from lora_diffusion.tools.resize import ranks_by_part

    console = Console()
    _print_facts(
        console,
        [
            ("written", str(target)),
            ("size", " → ".join(_size(count) for count in resizing.bytes)),
            ("error", f"{resizing.error:.2%} of the whole change"),
        ],
    )
    table = _table("part", "modules", "rank before", "rank after", "error mean", "error max")
    for prefix, modules in ranks_by_part(resizing.modules).items():
        ranks = [_range([module.ranks[when] for module in modules]) for when in (0, 1)]
        errors = [module.error for module in modules]
        table.add_row(
            _PARTS.get(prefix, prefix), str(len(modules)), *ranks, f"{mean(errors):.2%}", f"{max(errors):.2%}"
        )
    _print_table(console, table)
    table = _table("the modules that lost most", "rank before", "rank after", "error")
    for module in resizing.worst(_WORST):
        table.add_row(shown(module.name), *map(str, module.ranks), f"{module.error:.2%}")
    _print_table(console, table)
    _print_notes(console, resizing.notes)


def print_overlap(overlap: Overlap, alike_above: float) -> None:
    console = Console()
    pairs = [(i, j) for i in range(len(overlap.names)) for j in range(i + 1, len(overlap.names))]
    table = _table("adapter", "adapter", "cosine", "highest in", "")
    for i, j in pairs:
        values = {block: matrix[i][j] for block, matrix in overlap.by_block.items() if matrix[i][j] == matrix[i][j]}
        top = max(values, key=lambda block: abs(values[block]), default="")
        first, second = (shown(overlap.names[n], 40) for n in (i, j))
        table.add_row(first, second, _cosine(overlap.whole[i][j]), top, _cosine(values[top]) if top else "")
    _print_table(console, table)
    if len(pairs) == 1:
        table = _table("block", "cosine")
        for block, matrix in overlap.by_block.items():
            table.add_row(block, _cosine(matrix[0][1]))
        _print_table(console, table)
    _print_notes(
        console,
        [
            f"{first} and {second} move the same directions (cosine {value:.2f}, above {alike_above}): used together "
            "they act like one of them, stronger"
            for first, second, value in overlap.alike
        ],
    )


def _facts(report: Inspection) -> list[tuple[str, str]]:
    family = FAMILY_NAMES.get(report.family, "not known")
    spelling = f", UNet blocks as {report.spelling} names them" if report.spelling else ""
    stored = {"": "none stored", report.computed_hash: "as stored"}.get(report.stored_hash, "NOT as stored")
    return [
        ("file", report.file),
        ("size", f"{_size(report.bytes)}, {_counts(report.dtypes)}"),
        ("kind", _counts(report.kinds)),
        ("made for", family),
        ("names", report.format + spelling),
        ("sha256", report.sha256),
        ("tensor hash", f"{report.computed_hash} ({stored})"),
    ]


def _print_parts(console: Console, report: Inspection) -> None:
    table = _table("part", "modules", "kind", "rank", "alpha", "alpha / rank")
    for part in report.parts:
        spreads = (_spread(part.rank), _spread(part.alpha), _spread(part.scale))
        table.add_row(part.name, str(part.num_modules), ", ".join(part.kinds), *spreads)
    _print_table(console, table)


def _print_blocks(console: Console, report: Inspection) -> None:
    what = "direction, before DoRA rescales it" if report.is_direction else "block"
    table = _table(what, "modules", "norm", "effective rank", "")
    largest = max((block.norm for block in report.blocks.values()), default=0.0)
    for name, block in report.blocks.items():
        bar = "█" * round(20 * block.norm / largest) if largest else ""
        table.add_row(name, str(block.num_modules), f"{block.norm:.3g}", f"{block.effective_rank:.1f}", Text(bar))
    _print_table(console, table)


def _print_readers(console: Console, readers: Mapping[str, Reading]) -> None:
    table = _table("program", "reads it", "because", numbers=())
    for reader, reading in readers.items():
        style = _STYLES.get(reading.verdict, "red")
        table.add_row(reader, Text(reading.verdict, style=style), shown("; ".join(reading.reasons), 400))
    _print_table(console, table)


def _print_facts(console: Console, facts: Iterable[tuple[str, str]], title: str = "") -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(shown(label, 60), shown(value))
    if title:
        console.print(f"[bold]{title}[/]")
    _print_table(console, table)


def _print_table(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(Text.assemble(("Note: ", "bold yellow"), shown(note, 400)), highlight=False)


def _table(*columns: str, numbers: Sequence[int] | None = None) -> Table:
    """numbers: the columns that stand at the right; all but the first if left out."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for at, column in enumerate(columns):
        is_number = column != "" and (at > 0 if numbers is None else at in numbers)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def _spread(spread: Spread) -> str:
    if spread.least == spread.most:
        return f"{spread.least:.4g}"
    mostly = f", mostly {spread.common:.4g}" if spread.share > 0.5 else ""
    return f"{spread.least:.4g} to {spread.most:.4g}{mostly}"


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _counts(counts: Mapping[str, int]) -> str:
    """As text: "lora", or "191 lora, 1 loha"."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1]))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _cosine(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"
