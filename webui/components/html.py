"""HTML in which everything that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from markupsafe import Markup


def html(template: str, /, **values: object) -> Markup:
    """`template` is trusted, `values` are not: texts are escaped, Markup is kept. For elements and quotes."""
    return Markup(template).format(**values)


def join(parts: Iterable[Markup]) -> Markup:
    """The parts one after another."""
    return Markup("").join(parts)


def said(text: str, *, bad: bool = False) -> str:
    """What came of a click, in a line of its own."""
    return str(html('<p class="said {kind}" role="status">{text}</p>', kind="bad" if bad else "good", text=text))


def with_code(text: str) -> Markup:
    """The text, with what stands between backticks as code."""
    parts = text.split("`")
    return join(html("<code>{part}</code>" if index % 2 else "{part}", part=part) for index, part in enumerate(parts))


def picture_url(kind: str, id: str, width: int) -> str:
    """The address of a picture at most `width` pixels wide."""
    return f"/picture/{kind}/{quote(id)}?w={width}"


def duration(seconds: float) -> str:
    """1:05 or 2:03:00."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(num_bytes: float) -> str:
    """For example 3.2 GB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
