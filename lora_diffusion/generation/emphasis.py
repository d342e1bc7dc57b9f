"""Weights in prompts, in A1111's notation: `(word:1.2)`, `(word)` for 1.1, `[word]` for 1 / 1.1 (no torch)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MORE = 1.1
LESS = 1 / 1.1

_SYMBOL = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)
_PAIRS = {")": "(", "]": "["}
_CLOSES = -1


@dataclass(frozen=True)
class Piece:
    """Text of one weight; 1 is as written."""

    text: str
    weight: float


def parse_emphasis(prompt: str) -> list[Piece]:
    r"""The prompt in pieces of one weight each, brackets taken out; neighbours differ in weight.

    Brackets nest, and their weights multiply. `\(` `\)` `\[` `\]` `\\` are the characters themselves. A bracket that
    is never closed weighs all that follows, as in A1111; one that closes nothing is text, as is a `:` without number.
    """
    events: list[str | int] = []  # text, the place in `factors` of a bracket that opens, or `_CLOSES`
    factors: list[float] = []
    opened: list[tuple[str, int]] = []
    for match in _SYMBOL.finditer(prompt):
        if match["open"]:
            opened.append((match["open"], len(factors)))
            events.append(len(factors))
            factors.append(MORE if match["open"] == "(" else LESS)
        elif match["weight"] and opened and opened[-1][0] == "(":
            factors[opened.pop()[1]] = float(match["weight"])
            events.append(_CLOSES)
        elif match["close"] and opened and opened[-1][0] == _PAIRS[match["close"]]:
            opened.pop()
            events.append(_CLOSES)
        else:
            events.append(match["escaped"] or match[0])
    return _joined(_weighed(events, factors))


def plain_text(pieces: list[Piece]) -> str:
    """What the text encoder reads. Where the weight changes a word ends, so that every token has one weight."""
    return " ".join(piece.text for piece in pieces)


def is_weighted(pieces: list[Piece]) -> bool:
    return any(piece.weight != 1 for piece in pieces)


def _weighed(events: Iterable[str | int], factors: Sequence[float]) -> Iterator[Piece]:
    """The texts, each with the product of the brackets around it: from the inner to the outer, as A1111 rounds it."""
    around: list[float] = []
    for event in events:
        if isinstance(event, str):
            yield Piece(event, math.prod(reversed(around), start=1.0))
        elif event == _CLOSES:
            around.pop()
        else:
            around.append(factors[event])


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    groups = itertools.groupby(pieces, key=lambda piece: piece.weight)
    return [Piece("".join(piece.text for piece in group), weight) for weight, group in groups]
