from __future__ import annotations

import pytest

from lora_diffusion.errors import UserError
from lora_diffusion.generation.request import (
    Request,
    adapter_name,
    check_adapter_name,
    format_number,
    resolve_tags,
    take_out_tags,
    write_tags,
)


@pytest.mark.parametrize(
    ("prompt", "clean", "strengths"),
    [
        ("a cat", "a cat", {}),
        ("a cat <lora:ink:0.8>", "a cat", {"ink": 0.8}),
        ("a cat <lora:ink:0.8>, red", "a cat, red", {"ink": 0.8}),
        ("<lora:ink>a cat", "a cat", {"ink": 1.0}),
        ("a <lora:my ink-v1.2:-0.5> cat <lora:neon:1e-3>", "a cat", {"my ink-v1.2": -0.5, "neon": 0.001}),
        ("a <lora:ink:0.5:0.5>", "a", {"ink": 0.5}),
        ("1 < 2 <lora:> <b>", "1 < 2 <lora:> <b>", {}),
    ],
)
def test_tags_leave_the_prompt_and_give_strengths(prompt: str, clean: str, strengths: dict[str, float]) -> None:
    assert take_out_tags(prompt) == (clean, strengths)


def test_strengths_of_a_name_tagged_twice_are_added() -> None:
    assert take_out_tags("<lora:ink:0.5><lora:ink:0.25>")[1] == {"ink": 0.75}


def test_a_tag_wins_over_the_map() -> None:
    request = resolve_tags(Request("a cat <lora:ink:0.8>", adapters={"ink": 0.1, "neon": 0.2}))
    assert request == Request("a cat", adapters={"ink": 0.8, "neon": 0.2})


@pytest.mark.parametrize("tag", ["<lora:ink:strong>", "<lora:ink:nan>", "<lora:ink:inf>", "<lora:ink:>"])
def test_a_strength_that_is_no_number_is_refused_with_the_tag(tag: str) -> None:
    with pytest.raises(UserError, match=tag):
        take_out_tags(f"a cat {tag}")


def test_separate_text_encoder_strength_is_refused() -> None:
    with pytest.raises(UserError, match="separate strengths"):
        take_out_tags("<lora:ink:0.5:0.8>")


def test_written_tags_read_back() -> None:
    adapters = {"ink": 0.1 + 0.2, "neon": 1.0, "c": -3e-7, "d": 0.0}
    assert take_out_tags(write_tags(adapters)) == ("", adapters)


@pytest.mark.parametrize("name", ["", "a:b", "a<b", "a>b", "a,b", 'a"b', "a\nb", " a"])
def test_names_that_tags_cannot_hold_are_refused_and_replaced(name: str) -> None:
    with pytest.raises(UserError, match="Adapter name"):
        check_adapter_name(name)
    replaced = adapter_name(name)
    assert check_adapter_name(replaced) == replaced
    assert take_out_tags(write_tags({replaced: 0.5}))[1] == {replaced: 0.5}


@pytest.mark.parametrize(
    ("value", "text"), [(7.0, "7"), (0.8, "0.8"), (-1.0, "-1"), (1e22, "1e+22"), (1 / 3, repr(1 / 3))]
)
def test_numbers_are_short_and_exact(value: float, text: str) -> None:
    assert format_number(value) == text
    assert float(text) == value
