"""Captions as files, and how they vary."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora_diffusion.data.captions import CaptionError, CaptionOptions, printable, read_caption, vary_caption

TAGS = "a house, red, tall, at night"


@pytest.fixture
def caption_file(tmp_path: Path) -> Path:
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a red house", "a red house"),
        (b"  a red house \r\n", "a red house"),
        (b"\xef\xbb\xbfa red house", "a red house"),
        (b"a red house,\r\nat night\r\n\r\n", "a red house, at night"),
        ("ein grünes Haus 🏠".encode(), "ein grünes Haus 🏠"),
        ("gru\u0308n".encode(), "gr\u00fcn"),
        ("a red house".encode("utf-16"), "a red house"),
        (b"\xfe\xff" + "grün".encode("utf-16-be"), "grün"),
        (b"", ""),
        (b" \n\t ", ""),
        (b"a {red|blue} ((house)) <lora:x:1>", "a {red|blue} ((house)) <lora:x:1>"),
    ],
)
def test_a_caption_file_is_read_as_one_line_of_text(caption_file: Path, data: bytes, text: str):
    caption_file.write_bytes(data)
    assert read_caption(caption_file) == text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"caf\xe9 house", "byte 3 is not UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 6 is not UTF-8"),
        ("house".encode("utf-16-le"), "character 1 is NUL"),
        (b"\xff\xfe\x00\xd8a\x00", "byte 2 is not UTF-16"),
        (b"ok\xed\xa0\x80", "byte 2 is not UTF-8"),
    ],
)
def test_other_encodings_are_an_error_naming_file_place_and_fix(caption_file: Path, data: bytes, named: str):
    caption_file.write_bytes(data)
    with pytest.raises(CaptionError, match=named) as caught:
        read_caption(caption_file)
    assert str(caption_file) in str(caught.value)
    assert "UTF-8" in str(caught.value)


@pytest.mark.parametrize("kind", ["a folder", "nothing"])
def test_a_file_that_cannot_be_read_is_told_with_its_name_and_the_reason(caption_file: Path, kind: str):
    if kind == "a folder":
        caption_file.mkdir()
    reason = {"a folder": "Is a directory", "nothing": "No such file"}[kind]
    with pytest.raises(CaptionError, match=rf"a\.txt: cannot be read \({reason}"):
        read_caption(caption_file)


def test_a_file_of_many_megabytes_is_no_caption(caption_file: Path):
    caption_file.write_bytes(b"a" * (5 * 2**20))
    with pytest.raises(CaptionError, match="5,242,880 bytes"):
        read_caption(caption_file)


def test_without_options_a_caption_stays_as_it_is():
    assert vary_caption("a,b ,  c", CaptionOptions(), random.Random(0)) == "a,b ,  c"


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("sks", "at noon", "sks a house at noon"),
        ("in sks style, ", ", detailed", "in sks style, a house, detailed"),
        ("", "", "a house"),
    ],
)
def test_prefix_and_suffix_never_grow_together_with_a_word(prefix: str, suffix: str, expected: str):
    assert vary_caption("a house", CaptionOptions(prefix=prefix, suffix=suffix), random.Random(0)) == expected


def test_an_empty_caption_becomes_the_prefix_alone():
    assert vary_caption("", CaptionOptions(prefix="sks"), random.Random(0)) == "sks"


def test_shuffling_keeps_every_tag_and_the_first_ones_in_place():
    options = CaptionOptions(shuffle=True, keep_tokens=2)
    seen = {vary_caption("a, b, c, d, e", options, random.Random(seed)) for seed in range(50)}
    assert len(seen) == 6  # all orders of three
    assert all(caption.startswith("a, b, ") for caption in seen)
    assert all(sorted(caption.split(", ")) == ["a", "b", "c", "d", "e"] for caption in seen)


def test_the_same_random_state_gives_the_same_caption():
    options = CaptionOptions(shuffle=True, tag_dropout=0.3, dropout=0.1)
    assert [vary_caption(TAGS, options, random.Random(s)) for s in range(20)] == [
        vary_caption(TAGS, options, random.Random(s)) for s in range(20)
    ]


def test_tag_dropout_leaves_out_its_share_of_the_tags_but_never_a_kept_one():
    options = CaptionOptions(keep_tokens=1, tag_dropout=0.25)
    captions = [vary_caption(TAGS, options, random.Random(seed)).split(", ") for seed in range(1000)]
    assert all(tags[0] == "a house" for tags in captions)
    kept = sum(len(tags) - 1 for tags in captions) / 3000
    assert kept == pytest.approx(0.75, abs=0.04)  # five standard deviations of 3000 draws


def test_dropout_empties_its_share_of_the_captions_whole():
    options = CaptionOptions(prefix="sks", dropout=0.1)
    captions = [vary_caption(TAGS, options, random.Random(seed)) for seed in range(1000)]
    assert set(captions) == {"", f"sks {TAGS}"}
    assert captions.count("") / 1000 == pytest.approx(0.1, abs=0.05)


def test_without_chance_only_prefix_and_suffix_remain():
    options = CaptionOptions(prefix="sks", suffix="x", shuffle=True, keep_tokens=1, tag_dropout=0.9, dropout=0.9)
    assert vary_caption(TAGS, options.without_chance(), random.Random(0)) == f"sks {TAGS} x"


def test_another_separator_splits_and_joins():
    options = CaptionOptions(shuffle=True, keep_tokens=3, separator=";")
    assert vary_caption("a, b; c;d", options, random.Random(0)) == "a, b; c; d"


def test_control_and_direction_characters_are_shown_as_escapes():
    assert printable("a\x1b[31m\nb\u202e\udcff é") == "a\\x1b[31m\\nb\\u202e\\udcff é"
