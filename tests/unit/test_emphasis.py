from __future__ import annotations

import pytest

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


def test_thousands_of_brackets_are_read_in_a_moment() -> None:
    assert parse_emphasis("(" * 5000 + "a" + ")" * 5000)[0].text == "a"
    assert parse_emphasis("(" * 10_000) == []


def test_pieces_are_plain_values() -> None:
    assert Piece("a", 1.0) == Piece("a", 1.0)
