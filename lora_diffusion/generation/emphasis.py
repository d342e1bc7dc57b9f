"""Weights in prompts, in A1111's notation: `(word:1.2)`, `(word)` for 1.1, `[word]` for 1 / 1.1 (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass

MORE = 1.1
LESS = 1 / 1.1

_SYMBOL = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)
_PAIRS = {")": "(", "]": "["}


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
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []  # the bracket, and how many pieces stood before it

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [Piece(piece.text, piece.weight * factor) for piece in pieces[start:]]

    for match in _SYMBOL.finditer(prompt):
        if match["open"]:
            opened.append((match["open"], len(pieces)))
        elif match["weight"] and opened and opened[-1][0] == "(":
            weigh(opened.pop()[1], float(match["weight"]))
        elif match["close"] and opened and opened[-1][0] == _PAIRS[match["close"]]:
            weigh(opened.pop()[1], MORE if match["close"] == ")" else LESS)
        else:
            pieces.append(Piece(match["escaped"] or match[0], 1.0))
    for bracket, start in opened:
        weigh(start, MORE if bracket == "(" else LESS)
    return _joined(pieces)


def plain_text(pieces: list[Piece]) -> str:
    """What the text encoder reads. Where the weight changes a word ends, so that every token has one weight."""
    return " ".join(piece.text for piece in pieces)


def is_weighted(pieces: list[Piece]) -> bool:
    return any(piece.weight != 1 for piece in pieces)


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined
