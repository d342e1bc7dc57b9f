"""Line charts as inline SVG: no library in the browser, nothing loaded, readable without JavaScript."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from webui.components.html import html, join

WIDTH, HEIGHT = 1000.0, 300.0  # of the drawing; the page stretches it


@dataclass(frozen=True)
class Line:
    """points: (step, value). tone: 1 to 4. A faint line is background and has no name."""

    name: str
    tone: int
    points: Sequence[tuple[float, float]]
    is_faint: bool = False
    is_dashed: bool = False


def render_chart(
    lines: Sequence[Line], *, step_word: str, is_log: bool = False, is_low: bool = False, label: str = ""
) -> Markup:
    """Empty where no line has a point. Values that a logarithm does not take are left out of a log chart."""
    drawn = [
        Line(line.name, line.tone, points, line.is_faint, line.is_dashed)
        for line in lines
        if (points := [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not is_log)])
    ]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn for x, _ in line.points]
    low_x, high_x = min(xs), max(xs)
    low, high = _span([y for line in drawn for _, y in line.points], is_log)
    ticks = _log_ticks(low, high) if is_log else _ticks(low, high, 3 if is_low else 5)

    def place(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if is_log else (y - low) / (high - low)
        return HEIGHT * (1 - share)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{WIDTH * (x - low_x) / ((high_x - low_x) or 1):.1f},{place(y):.1f}" for x, y in points)

    rules = join(
        html(
            '<line class="rule" x1="0" x2="1000" y1="{y}" y2="{y}" vector-effect="non-scaling-stroke"/>',
            y=f"{place(tick):.1f}",
        )
        for tick in ticks
    )
    paths = join(
        html(
            '<polyline class="tone-{tone}{faint}{dashed}" points="{points}"/>',
            tone=line.tone,
            faint=" faint" if line.is_faint else "",
            dashed=" dashed" if line.is_dashed else "",
            points=path(line.points if len(line.points) > 1 else [*line.points, *line.points]),
        )
        for line in drawn
    )
    named = [line for line in drawn if line.name]
    data = [
        {"name": line.name, "tone": line.tone, "points": [[x, float(f"{y:.6g}")] for x, y in line.points]}
        for line in named
    ]
    y_labels = join(
        html('<span style="top:{top}%">{text}</span>', top=f"{place(tick) / HEIGHT * 100:.2f}", text=number(tick))
        for tick in ticks
    )
    x_labels = join(
        html('<span style="left:{left}%">{text}</span>', left=left, text=text)
        for left, text in _x_labels(low_x, high_x)
    )
    return html(
        '<div class="frame"><div class="y">{y}</div><div class="plot{low}" data-range="{a} {b}" data-step="{step}" '
        'data-lines="{data}"><svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{label}">'
        '{rules}{paths}</svg><div class="cursor" hidden><div class="tip"></div></div></div><div></div>'
        '<div class="x">{x}</div></div>',
        y=y_labels,
        low=" low" if is_low else "",
        a=low_x,
        b=high_x,
        step=step_word,
        data=json.dumps(data),
        label=label,
        rules=rules,
        paths=paths,
        x=x_labels,
    )


def render_legend(lines: Sequence[Line]) -> Markup:
    return html(
        '<p class="legend">{items}</p>',
        items=join(
            html('<b class="tone-{tone}"><i></i><span>{name}</span></b>', tone=line.tone, name=line.name)
            for line in lines
            if line.name and line.points
        ),
    )


def number(value: float) -> str:
    """Short, as on an axis: 0.002, 1e-5, 1,200."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _span(values: Sequence[float], is_log: bool) -> tuple[float, float]:
    """The axis, without the few outliers that would flatten everything else, with a little room."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * (len(ordered) - 1)))]
    if is_log:
        return low / 1.1, max(high, low) * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 and low - room < 0 else low - room), high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) > 7:
        ticks = [mark for mark in ticks if f"{mark:e}".startswith("1")]
    return ticks if len(ticks) > 1 else [low * (high / low) ** share for share in (0.1, 0.5, 0.9)]


def _x_labels(low: float, high: float) -> list[tuple[str, str]]:
    if high <= low:
        return [("0", f"{low:.0f}")]
    inner = [tick for tick in _ticks(low, high, 5) if low + 0.08 * (high - low) < tick < high - 0.08 * (high - low)]
    marks = [low, *inner, high]
    return [(f"{(mark - low) / (high - low) * 100:.2f}", f"{mark:,.0f}") for mark in marks]
