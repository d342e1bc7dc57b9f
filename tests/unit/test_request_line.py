from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.formats.argument import parse_adapter, parse_adapters
from lora_diffusion.generation.infotext import read_png
from lora_diffusion.generation.request import Request
from lora_diffusion.generation.request_line import parse_size, write_pictures
from lora_diffusion.models.load import load_model
from tests.random_adapters import random_adapter
from tests.tiny import make_tiny_sd1

REQUEST = Request("a cat", seed=3, steps=1, size=(32, 32))


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("ink.safetensors", "ink.safetensors", 1.0),
        ("a/ink.safetensors:0.8", "a/ink.safetensors", 0.8),
        ("ink.safetensors:-1", "ink.safetensors", -1.0),
        (r"C:\a\ink.safetensors", r"C:\a\ink.safetensors", 1.0),
        (r"C:\a\ink.safetensors:0.5", r"C:\a\ink.safetensors", 0.5),
    ],
)
def test_an_adapter_is_a_file_and_perhaps_a_strength(text: str, file: str, strength: float) -> None:
    assert parse_adapter(text) == (Path(file), strength)


@pytest.mark.parametrize("text", ["ink.safetensors:strong", "ink.safetensors:nan", "ink.safetensors:", ":0.5"])
def test_a_strength_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a strength"):
        parse_adapter(text)


def test_a_file_that_is_given_twice_has_its_strengths_added() -> None:
    given = ["ink.safetensors:0.5", "neon.safetensors", "./ink.safetensors:0.25"]
    assert parse_adapters(given) == {Path("ink.safetensors"): 0.75, Path("neon.safetensors"): 1.0}


def test_a_size_is_width_x_height() -> None:
    assert parse_size("512x768") == (512, 768)
    for text in ("512", "512x", "ax b", "512x768x3", "-64x64"):
        with pytest.raises(UserError, match="as in 512x768"):
            parse_size(text)


def test_pictures_carry_what_made_them_and_never_replace_earlier_ones(tmp_path: Path) -> None:
    base = make_tiny_sd1(tmp_path / "tiny base")
    adapter = tmp_path / "ink-v1.2.safetensors"
    random_adapter(load_model(base), seed=1).write(adapter, dtype=torch.float32)
    request = Request("a <lora:ink-v1.2:0.5> cat", seed=3, steps=1)
    first = write_pictures(str(base), [adapter], [request, REQUEST], tmp_path / "out")
    second = write_pictures(str(base), [], [REQUEST], tmp_path / "out")
    assert [path.name for path in first + second] == ["00000-3.png", "00001-3.png", "00002-3.png"]
    read = read_png(first[0])
    assert read.request == Request("a cat", seed=3, steps=1, size=(64, 64), adapters={"ink-v1.2": 0.5})
    assert read.model == "tiny base"
    assert len(read.hashes["ink-v1.2"]) == 12
    with Image.open(first[1]) as a, Image.open(second[0]) as b:
        assert a.tobytes() == b.tobytes()


def test_a_picture_that_another_process_draws_into_the_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    base = make_tiny_sd1(tmp_path / "base")
    out = tmp_path / "out"

    def another(steps: Any, title: str = "", **_: Any) -> Iterator[Any]:
        for step in steps:
            if title == "drawing":
                (out / "00000-3.png").write_bytes(b"another")
            yield step

    paths = write_pictures(str(base), [], [REQUEST, REQUEST], out, track=another)
    assert [path.name for path in paths] == ["00001-3.png", "00002-3.png"]
    assert (out / "00000-3.png").read_bytes() == b"another"
    assert len(list(out.iterdir())) == 3


def test_nothing_is_drawn_when_one_request_is_wrong(tmp_path: Path) -> None:
    base = make_tiny_sd1(tmp_path / "base")
    with pytest.raises(UserError, match="No adapter named 'ink'"):
        write_pictures(str(base), [], [REQUEST, Request("a <lora:ink:1>")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
