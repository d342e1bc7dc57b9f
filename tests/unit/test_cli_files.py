"""The commands on adapter files: what they print, and what they never overwrite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.tools.tables import shown
from tests.adapter_parts import TE, Q, loha, lora, randn, saved, sd1_modules

WRITERS = (("convert", "--format", "peft"), ("resize", "--rank", "2"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "a.safetensors", sd1_modules(), {"ss_output_name": "ink"})


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- what is printed -------------------------------------------------------------------------------------------------


def test_inspect_tells_parts_blocks_and_readers(source: Path) -> None:
    result = run("inspect", source)
    text = one_line(result.stdout)

    assert result.exit_code == 0
    assert "UNet 4 lora 2 to 5 0.3333 to 7 0.1111 to 1.4" in text
    assert "made for SD 1.x" in text
    assert re.search(r"down 1\.0 4 [\d.]+ [\d.]+ █+", text)
    assert "ComfyUI as trained" in text
    assert "diffusers differently where attention layers have different alphas" in text
    assert "ss_output_name ink" in text


def test_inspect_names_the_rank_of_most_modules(tmp_path: Path) -> None:
    modules = {f"{Q}{i}": lora(rank=rank) for i, rank in enumerate((4, 4, 2))}

    assert "UNet 3 lora 2 to 4, mostly 4 3 0.75 to 1.5, mostly 0.75" in one_line(
        run("inspect", saved(tmp_path / "a.safetensors", modules)).stdout
    )


def test_inspect_says_of_a_dora_that_it_shows_the_direction(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {Q: lora() | {"dora_scale": randn(12, 1)}})

    assert "direction, before DoRA rescales it" in run("inspect", path).stdout


def test_evil_metadata_is_shown_as_text(tmp_path: Path) -> None:
    metadata = {
        "a": "\x1b[2J\x1b]0;title\x07",
        "b": "[red]not red[/red] [link=https://x.org]x[/link]",
        "c": "\u202egnp.exe",
        "d": "line\nline\r\tline",
        "e" * 500: "z" * 100_000,
        "f\x1b[31m": "😀 é",
    }
    result = run("inspect", saved(tmp_path / "a.safetensors", {Q: lora()}, metadata))

    assert result.exit_code == 0
    assert not set(result.stdout) & set("\x1b\x07\r\t\u202e")
    for text in (r"\x1b[2J", "[red]not red[/red]", r"\u202egnp.exe", r"line\nline\r\tline", r"f\x1b[31m", "😀 é"):
        assert text in result.stdout
    assert "(161 characters)" not in result.stdout
    assert "(100,000 characters)" in result.stdout
    assert len(result.stdout) < 20_000


def test_metadata_of_many_entries_is_cut(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {Q: lora()}, {f"key{i:03}": "x" for i in range(100)})
    text = run("inspect", path).stdout

    assert "key079" in text and "key080" not in text
    assert "and 20 more (--json lists all)" in text


def test_half_a_character_in_metadata_is_shown_as_its_number() -> None:
    assert shown("a\ud800b").plain == r"a\ud800b"


def test_a_false_hash_is_told(tmp_path: Path) -> None:
    result = run("inspect", saved(tmp_path / "a.safetensors", {Q: lora()}, {"sshs_model_hash": "0" * 64}))

    assert "(NOT as stored)" in result.stdout
    assert "they were changed after it was written" in one_line(result.stdout)


@pytest.mark.parametrize("command", ["inspect", "overlap"])
def test_json_alone_is_on_stdout(source: Path, command: str) -> None:
    result = run(command, *([source] * (1 + (command == "overlap"))), "--json")

    assert json.loads(result.stdout)


def test_convert_tells_formats_readers_and_notes(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "b.safetensors", "--format", "peft")
    text = one_line(result.stdout)

    assert result.exit_code == 0
    assert "5, kohya → peft" in text
    assert "diffusers as trained" in text
    assert AdapterFile.read(tmp_path / "b.safetensors").format == "peft"


def test_resize_tells_ranks_and_errors(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {Q: lora(rank=6), TE: loha()})
    result = run("resize", source, tmp_path / "b.safetensors", "--rank", 2)
    text = one_line(result.stdout)

    assert result.exit_code == 0
    assert re.search(r"UNet 1 6 2 [\d.]+% [\d.]+%", text)
    assert re.search(r"text encoder 1 4 2 [\d.]+% [\d.]+%", text)
    assert re.search(rf"{Q} 6 2 [\d.]+%", text)


def test_overlap_warns_of_adapters_that_move_the_same_directions(source: Path) -> None:
    text = one_line(run("overlap", source, source).stdout)

    assert "a (1) a (2) 1.000" in text
    assert "a (1) and a (2) move the same directions (cosine 1.00, above 0.5)" in text


@pytest.mark.parametrize("command", ["inspect", "overlap"])
def test_a_plot_is_drawn_where_asked(source: Path, tmp_path: Path, command: str) -> None:
    files = [source] * (1 + (command == "overlap"))

    assert run(command, *files, "--plot", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    again = run(command, *files, "--plot", tmp_path / "p.png")
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert run(command, *files, "--plot", source).exit_code == 2


# --- what is never overwritten ---------------------------------------------------------------------------------------


def link_to(source: Path, path: Path, kind: str) -> Path:
    if kind == "symbolic":
        path.symlink_to(source)
    elif kind == "hard":
        os.link(source, path)
    elif kind == "relative":
        (path.parent / "folder").mkdir()
        return path.parent / "folder" / ".." / source.name
    return path if kind in ("symbolic", "hard") else source


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for a privilege to link")
@pytest.mark.parametrize("kind", ["same", "symbolic", "hard", "relative"])
@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
def test_an_input_is_never_overwritten(source: Path, tmp_path: Path, command: tuple[str, ...], kind: str) -> None:
    before = source.read_bytes()
    target = link_to(source, tmp_path / "link.safetensors", kind)
    result = run(command[0], source, target, *command[1:], "--overwrite")

    assert result.exit_code == 2
    assert "never overwritten" in one_line(result.stderr)
    assert source.read_bytes() == before


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
def test_an_output_is_replaced_only_when_told(source: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    target = tmp_path / "b.safetensors"
    target.write_text("mine")
    refused = run(command[0], source, target, *command[1:])

    assert refused.exit_code == 2
    assert "b.safetensors" in refused.stderr and "--overwrite" in refused.stderr
    assert target.read_text() == "mine"
    assert run(command[0], source, target, *command[1:], "--overwrite").exit_code == 0
    assert AdapterFile.read(target).modules


@pytest.mark.parametrize(
    ("target", "reason"),
    [("b.ckpt", "should end in .safetensors"), ("no/b.safetensors", "no folder"), ("d.safetensors", "It is no file")],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(
    source: Path, tmp_path: Path, target: str, reason: str
) -> None:
    (tmp_path / "d.safetensors").mkdir()
    result = run("convert", source, tmp_path / target, "--format", "kohya", "--overwrite")

    assert result.exit_code == 2
    assert reason in one_line(result.stderr)


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("convert", "b.safetensors", "--format", "kohya"), ("resize", "b.safetensors", "--rank", "2")],
)
def test_a_file_that_is_no_adapter_is_named_with_the_reason(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no adapter")
    name, *rest = command
    result = run(name, tmp_path / "a.safetensors", *[tmp_path / x if "." in x else x for x in rest])

    assert result.exit_code == 2
    assert "a.safetensors: not a safetensors file" in one_line(result.stderr)


def test_the_commands_are_there_without_torch() -> None:
    script = (
        "import sys, lora_diffusion.cli as c; sys.exit('torch' in sys.modules or len(c.app.registered_commands) < 7)"
    )

    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
