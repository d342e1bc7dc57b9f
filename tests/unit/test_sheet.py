"""Sheets: what stands in which cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.infotext import read_png
from lora_diffusion.generation.sheet import Axis, Sheet, draw_cells, parse_axis
from lora_diffusion.models.load import load_model
from tests.random_adapters import random_adapter

REQUEST = Request("a red house", seed=1, steps=1, cfg=2.0, size=(32, 32), adapters={"ink": 0.8, "neon": 0.5})


def requests(x: str, y: str | None = None, z: str | None = None) -> list[Request]:
    axes = [parse_axis(text, "--x") if text else None for text in (x, y, z)]
    assert axes[0] is not None
    return [cell.request for cell in Sheet(REQUEST, axes[0], axes[1], axes[2]).cells()]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("strength=0,1", [{"adapters": {"ink": 0, "neon": 0}}, {"adapters": {"ink": 1, "neon": 1}}]),
        ("checkpoint=ink-1,none", [{"adapters": {"ink-1": 0.8, "neon": 0.5}}, {"adapters": {"neon": 0.5}}]),
        ("checkpoint=neon", [{"adapters": {"neon": 1.3}}]),  # as two copies of it would be
        ("adapter=ink+neon:0.3,none", [{"adapters": {"ink": 1, "neon": 0.3}}, {"adapters": {}}]),
        ("adapter=ink+neon:0.5+ink:0.25", [{"adapters": {"ink": 1.25, "neon": 0.5}}]),
        ("seed=3,4", [{"seed": 3}, {"seed": 4}]),
        (f"seed={2**53 + 1},2e3", [{"seed": 2**53 + 1}, {"seed": 2000}]),
        ("cfg=1,7.5", [{"cfg": 1}, {"cfg": 7.5}]),
        ("steps=2,3", [{"steps": 2}, {"steps": 3}]),
        ("sampler=ddim,euler", [{"sampler": "ddim"}, {"sampler": "euler"}]),
        ("prompt=red|blue|dark, green", [{}, {"prompt": "a blue house"}, {"prompt": "a dark, green house"}]),
    ],
)
def test_each_axis_varies_its_setting_and_nothing_else(axis: str, expected: list[dict[str, object]]) -> None:
    assert requests(axis) == [replace(REQUEST, **change) for change in expected]


def test_cells_go_along_x_then_y_then_z() -> None:
    found = [(r.seed, r.cfg, r.steps) for r in requests("seed=1,2", "cfg=3,4", "steps=5,6")]
    assert found == [(x, y, z) for z in (5, 6) for y in (3, 4) for x in (1, 2)]


@pytest.mark.parametrize("order", [("strength=0.25,1", "checkpoint=a,b"), ("checkpoint=a,b", "strength=0.25,1")])
def test_strength_holds_for_the_checkpoint_whichever_axis_it_is_on(order: tuple[str, str]) -> None:
    found = {tuple(request.adapters.items()) for request in requests(*order)}
    assert found == {((name, value), ("neon", value)) for name in "ab" for value in (0.25, 1)}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("strength=0,1", [{"ink": 0, "neon": 0}, {"ink": 1, "neon": 1}]),
        ("adapter=ink:0.3,none", [{"ink": 0.3}, {}]),
        ("checkpoint=ink-1,none", [{"ink-1": 0.5, "neon": 0.7}, {"neon": 0.7}]),
    ],
)
def test_an_axis_of_adapters_varies_those_that_the_prompt_tags(axis: str, expected: list[dict[str, float]]) -> None:
    tagged = replace(REQUEST, prompt="a red house <lora:ink:0.5> <lora:neon:0.7>", adapters={})
    cells = Sheet(tagged, parse_axis(axis, "--x")).cells()
    assert [cell.request for cell in cells] == [replace(REQUEST, adapters=adapters) for adapters in expected]


def test_strength_holds_for_adapters_that_the_axis_prompt_tags() -> None:
    found = [
        (request.prompt, request.adapters) for request in requests("strength=0,1", "prompt=red|blue <lora:oil:0.2>")
    ]
    assert found == [
        ("a red house", {"ink": 0, "neon": 0}),
        ("a red house", {"ink": 1, "neon": 1}),
        ("a blue house", {"ink": 0, "neon": 0, "oil": 0}),
        ("a blue house", {"ink": 1, "neon": 1, "oil": 1}),
    ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("colour=1,2",), "'colour' cannot be an axis. Possible: adapter, cfg, checkpoint"),
        (("seed",), "--x seed: write the setting"),
        (("seed=1,,2",), "empty value"),
        (("seed=1,1",), "value twice"),
        (("seed=1.5",), "no whole number"),
        (("strength=much",), "'much', which is no number"),
        (("prompt=green|blue",), "does not hold 'green'.*axes adapter and strength"),
        ((f"prompt=e|{'b' * 5000}",), "the prompt has 10009 characters; at most 10000"),
        (("seed=1", "seed=2"), "same setting"),
        ((f"seed={','.join(map(str, range(30)))}", f"cfg={','.join(map(str, range(1, 31)))}"), "900 pictures"),
    ],
)
def test_a_wrong_axis_is_refused(axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        requests(*axes)


def test_cells_come_as_they_are_done_and_where_the_seed_is_the_same_so_is_the_noise(tiny_sd1: Path) -> None:
    engine = Engine(load_model(tiny_sd1), batch_size=2)
    request = replace(REQUEST, adapters={})
    cells = Sheet(request, parse_axis("steps=1,2", "--x"), parse_axis("cfg=2,2.0", "--y")).cells()
    images = dict(draw_cells(engine, cells))
    assert sorted(images) == [0, 1, 2, 3]
    assert np.array_equal(images[0], images[2]), "the same settings and the same noise"
    assert not np.array_equal(images[0], images[1])


def test_a_sheet_has_a_place_for_every_picture() -> None:
    sheet = Sheet(REQUEST, Axis("seed", ("1", "2")), Axis("cfg", ("1", "2")), Axis("steps", ("1", "2")))
    pictures: list[Image.Image | None] = [Image.new("RGB", (64, 64), (40 * i, 0, 0)) for i in range(7)]
    whole = np.asarray(sheet.picture([*pictures, None]))
    for i in range(1, 7):
        assert (whole == (40 * i, 0, 0)).all(-1).sum() == 192 * 192


def test_the_command_writes_a_sheet_that_says_how_it_was_drawn(tiny_sd1: Path, tmp_path: Path) -> None:
    model = load_model(tiny_sd1)
    for seed, name in enumerate(("ink", "ink-100")):
        random_adapter(model, seed=seed).write(tmp_path / f"{name}.safetensors", dtype=torch.float32)
    out = tmp_path / "sheets" / "sheet.png"
    files = ",".join(str(tmp_path / f"{name}.safetensors") for name in ("ink", "ink-100"))
    parts = [f"--adapter={tmp_path / 'ink.safetensors'}:{strength}" for strength in (0.2, 0.3)]  # 0.5 together
    arguments = ["grid", "--base", str(tiny_sd1), *parts]
    arguments += ["--prompt", "a cat", "--x", "strength=0,1", "--y", f"checkpoint={files}", "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--size", "32x32", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert read_png(out).request == Request("a cat", steps=1, size=(32, 32), adapters={"ink": 0.5})
    with Image.open(out) as image:
        assert 'Script: X/Y/Z plot, X Type: strength, X Values: "0, 1", Y Type: checkpoint' in image.text["parameters"]
        assert image.width > 2 * 192

    out.write_bytes(b"old")
    command = [
        "grid",
        "--base",
        str(tiny_sd1),
        "--prompt",
        "a cat",
        "--x",
        "seed=1,2",
        "--size",
        "32x32",
        "--steps",
        "1",
    ]
    assert CliRunner().invoke(app, [*command, "--out", str(out)]).exit_code == 2
    assert out.read_bytes() == b"old"
    assert CliRunner().invoke(app, [*command, "--out", str(out), "--overwrite"]).exit_code == 0
    assert read_png(out).request.seed == 0
