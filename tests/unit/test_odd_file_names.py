"""File names that are not UTF-8: what is made of such files can be opened by every program."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.container import header_bytes
from lora_diffusion.errors import RunError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.file_content import FileContent
from tests.adapter_parts import Q, lora, saved
from tests.single_file import make_single_file
from tests.unit.test_bake import TO_Q, size_of

ODD = os.fsdecode(b"caf\xe9.safetensors")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")


def metadata_of(path: Path) -> dict[str, str]:
    """As the safetensors library reads it, which opens no path that is not UTF-8."""
    with tempfile.TemporaryDirectory() as folder, safe_open(copied(path, folder), framework="pt") as file:
        return file.metadata()


def copied(path: Path, folder: str) -> Path:
    return Path(shutil.copy(path, Path(folder) / "plain"))


def run(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture
def odd_base(tiny_sd1: Path, tmp_path: Path) -> Path:
    return make_single_file(tiny_sd1, tmp_path / "base.safetensors").rename(tmp_path / ODD)


@pytest.fixture
def adapter(tiny_sd1: Path, tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter.safetensors", {TO_Q: lora(*size_of(tiny_sd1, TO_Q))})


@pytest.mark.parametrize("command", ["merge", "resize", "convert"])
def test_a_file_made_of_an_adapter_can_be_opened(tmp_path: Path, command: str) -> None:
    """Also in a folder with such a name."""
    saved(tmp_path / "a.safetensors", {Q: lora()})
    odd = Path(shutil.copy(tmp_path / "a.safetensors", tmp_path / ODD))
    (tmp_path / os.fsdecode(b"\xe9")).mkdir()
    out = tmp_path / os.fsdecode(b"\xe9") / ODD
    if command == "merge":
        run(command, odd, "--out", out)
    else:
        run(command, odd, out, *(["--rank", "2"] if command == "resize" else ["--format", "kohya"]))
    text = metadata_of(out)
    if command != "convert":
        made_by = json.loads(text["lora_diffusion.made_by"])
        assert r"caf\udce9" in (made_by["adapter"] if command == "resize" else made_by["adapters"][0]["name"])
    assert AdapterFile.read(out).modules.keys() == {Q}


def test_a_base_can_be_baked(odd_base: Path, adapter: Path, tmp_path: Path) -> None:
    run("bake", "--base", odd_base, "--adapter", adapter, "--out", tmp_path / "out.safetensors")
    assert metadata_of(tmp_path / "out.safetensors")["modelspec.merged_from"] == r"caf\udce9, adapter"


def test_the_difference_from_a_base_can_be_opened(odd_base: Path, adapter: Path, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    run("bake", "--base", odd_base, "--adapter", adapter, "--out", tuned)
    run("extract", "--base", odd_base, "--tuned", tuned, "--rank", "2", "--out", out)
    assert metadata_of(out)["ss_sd_model_name"] == r"caf\udce9"


def test_metadata_of_any_text_is_written_as_valid_unicode(tmp_path: Path) -> None:
    text = {"modelspec.title": "Caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{CAT FACE} \udce9", "\ud800": "x"}
    AdapterFile({Q: lora()}, text).write(tmp_path / "a.safetensors")
    found = metadata_of(tmp_path / "a.safetensors")
    assert found["modelspec.title"] == "Caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{CAT FACE} \\udce9"
    assert found[r"\ud800"] == "x"


def test_a_file_that_the_safetensors_library_cannot_open_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that only a lenient reader of JSON takes."""

    def header(self: FileContent, metadata: dict[str, str]) -> bytes:
        text = header_bytes(self.infos, metadata)[8:].replace(b'"pt"', b'"p\\udce9"')
        return len(text).to_bytes(8, "little") + text

    path = tmp_path / "a.safetensors"
    file = AdapterFile({Q: lora()})
    monkeypatch.setattr(FileContent, "header", header)
    with pytest.raises(RunError, match=r"what was written cannot be used and was not kept"):
        file.write(path, dtype=torch.float32)
    assert not path.exists()
