from __future__ import annotations

import itertools
import random
import re

import pytest

from lora_diffusion.generation import emphasis
from lora_diffusion.generation.emphasis import Piece, is_weighted, parse_emphasis, plain_text


def pieces(prompt: str) -> list[tuple[str, float]]:
    return [(piece.text, round(piece.weight, 4)) for piece in parse_emphasis(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red house", [("a red house", 1)]),
        ("a (red:1.3) house", [("a ", 1), ("red", 1.3), (" house", 1)]),
        ("a (red) house", [("a ", 1), ("red", 1.1), (" house", 1)]),
        ("a [red] house", [("a ", 1), ("red", 0.9091), (" house", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) house:0.5)", [("a ", 0.5), ("red", 1), (" house", 0.5)]),
        ("(a [red])", [("a ", 1.1), ("red", 1)]),
        ("(red: 1.5 )", [("red", 1.5)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        (r"a \(red\) \[house\] \\", [("a (red) [house] \\", 1)]),
        (r"(a \(red\):1.2)", [("a (red)", 1.2)]),
        ("(red", [("red", 1.1)]),
        ("red) house]", [("red) house]", 1)]),
        ("time: 12:30", [("time: 12:30", 1)]),
        ("(red:blue)", [("red:blue", 1.1)]),
        ("[red:1.5]", [("red:1.5", 0.9091)]),
        ("(a](b)", [("a]", 1.1), ("b", 1.21)]),
        ("()", []),
        ("a back\\slash", [("a back\\slash", 1)]),
        ("(a\nb:1.2)", [("a\nb", 1.2)]),
    ],
)
def test_brackets_weigh_as_in_a1111(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == expected


def test_a_prompt_without_brackets_is_one_piece_and_the_same_text() -> None:
    prompt = "a photo, of a  red house: 50% \n big"
    assert plain_text(parse_emphasis(prompt)) == prompt
    assert not is_weighted(parse_emphasis(prompt))


def test_a_weight_that_changes_inside_a_word_ends_the_word() -> None:
    assert plain_text(parse_emphasis("un(happy:1.2)")) == "un happy"


def test_brackets_that_cancel_out_weigh_nothing() -> None:
    assert not is_weighted(parse_emphasis("a (red:1.0) house"))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(" * 5000 + "a" + ")" * 5000, "a"),
        ("(" * 10_000, ""),
        ("(a" * 3300 + ")" * 3300, "a" * 3300),
        ("[a" * 5000, "a" * 5000),
        ("(a:" + "1" * 9990, "a:" + "1" * 9990),
    ],
    ids=["around one letter", "nothing", "around each other", "never closed", "a number without end"],
)
def test_thousands_of_brackets_or_digits_make_no_more_pieces_than_letters(
    prompt: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece made anew for each bracket around it takes seconds."""
    made: list[Piece] = []

    def counted(text: str, weight: float) -> Piece:
        made.append(Piece(text, weight))
        return made[-1]

    monkeypatch.setattr(emphasis, "Piece", counted)
    assert "".join(piece.text for piece in parse_emphasis(prompt)) == text
    assert len(made) <= 2 * len(prompt)


def test_random_brackets_weigh_what_the_rules_say() -> None:
    draw = random.Random(0)
    signs = [*"()[]([)]", ":1.2)", ":0.5)", ": 3. )", ":-.7)", "\\(", "\\]", "\\\\", "\\", ":", "a", "b c", "\n", "1"]
    for _ in range(5000):
        prompt = "".join(draw.choices(signs, k=draw.randint(0, 25)))
        found = parse_emphasis(prompt)
        letters = [(letter, piece.weight) for piece in found for letter in piece.text]
        expected = letters_of(prompt)

        assert [letter for letter, _ in letters] == [letter for letter, _ in expected], prompt
        assert [weight for _, weight in letters] == pytest.approx([weight for _, weight in expected]), prompt
        assert all(a.weight != b.weight and a.text for a, b in itertools.pairwise(found)), prompt


def letters_of(prompt: str) -> list[tuple[str, float]]:
    """Each letter with its weight, by the rules read one after the other: slow, and plain to see."""
    letters: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def weigh(factor: float) -> None:
        _, start = opened.pop()
        letters[start:] = [(letter, weight * factor) for letter, weight in letters[start:]]

    while prompt:
        last = opened[-1][0] if opened else ""
        number = re.match(r":\s*([+-]?(\d+\.?\d*|\.\d+))\s*\)", prompt)
        length = 1
        if prompt[0] == "\\" and prompt[1:2] in (*r"()[]\\",):
            letters.append((prompt[1], 1.0))
            length = 2
        elif prompt[0] in "([":
            opened.append((prompt[0], len(letters)))
        elif number:
            length = number.end()
            if last == "(":
                weigh(float(number[1]))
            else:
                letters += [(letter, 1.0) for letter in number[0]]
        elif last + prompt[0] in ("()", "[]"):
            weigh(1.1 if last == "(" else 1 / 1.1)
        else:
            letters.append((prompt[0], 1.0))
        prompt = prompt[length:]
    while opened:
        weigh(1.1 if opened[-1][0] == "(" else 1 / 1.1)
    return letters


def test_pieces_are_plain_values() -> None:
    assert Piece("a", 1.0) == Piece("a", 1.0)
