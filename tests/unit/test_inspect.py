"""What `inspect` tells, against numbers computed another way."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.tools.inspect import inspect_file, plot_inspection
from tests.adapter_parts import (
    CONV,
    PROJ_IN,
    TE,
    K,
    Parts,
    Q,
    loha,
    lora,
    randn,
    saved,
    sd1_modules,
    sdxl_modules,
)


def dense(parts: Parts) -> torch.Tensor:
    up, down = parts["lora_up.weight"].double().flatten(1), parts["lora_down.weight"].double().flatten(1)
    return parts["alpha"].item() / down.shape[0] * up @ down


def test_norm_and_effective_rank_of_a_block_are_those_of_the_dense_changes(tmp_path: Path) -> None:
    report = inspect_file(saved(tmp_path / "a.safetensors", sd1_modules()))
    in_block = [dense(parts) for name, parts in sd1_modules().items() if name != TE]
    ranks = []
    for delta in in_block:
        shares = torch.linalg.svdvals(delta)
        shares = shares[shares > 1e-9] / shares.sum()
        ranks.append(math.exp(float(-(shares * shares.log()).sum())))

    assert list(report.blocks) == ["down 1.0", "text 1"]
    block = report.blocks["down 1.0"]
    assert block.num_modules == 4
    assert block.norm == pytest.approx(math.sqrt(sum(float(delta.square().sum()) for delta in in_block)), rel=1e-6)
    assert block.effective_rank == pytest.approx(sum(ranks) / 4, rel=1e-6)


def test_parts_have_their_spread_of_rank_and_alpha(tmp_path: Path) -> None:
    modules = sdxl_modules(ldm=True)
    report = inspect_file(saved(tmp_path / "a.safetensors", modules, dtype=torch.float16))

    assert [(part.name, part.num_modules) for part in report.parts] == [
        ("UNet", 3),
        ("text encoder", 1),
        ("text encoder 2", 1),
    ]
    unet = report.parts[0]
    assert (unet.rank.least, unet.rank.most) == (2, 5)
    assert (unet.alpha.least, unet.alpha.most) == (1.5, 7.0)
    assert (unet.scale.least, unet.scale.most) == (1.5 / 4, 7 / 5)
    assert (report.family, report.format, report.spelling) == ("sdxl", "kohya", "LDM")
    assert report.dtypes == {"F16": 15}
    assert report.bytes == (tmp_path / "a.safetensors").stat().st_size


def test_kinds_are_counted(tmp_path: Path) -> None:
    report = inspect_file(saved(tmp_path / "a.safetensors", {Q: lora(), TE: lora(), CONV: loha(columns=72)}))

    assert report.kinds == {"lora": 2, "loha": 1}
    assert report.parts[0].kinds == {"lora": 1, "loha": 1}


def test_a_dora_is_measured_by_its_direction(tmp_path: Path) -> None:
    plain = inspect_file(saved(tmp_path / "a.safetensors", {Q: lora()}))
    dora = inspect_file(saved(tmp_path / "b.safetensors", {Q: lora() | {"dora_scale": randn(1, 8)}}))

    assert dora.is_direction and not plain.is_direction
    assert dora.blocks == plain.blocks


def test_hashes_are_those_of_the_file_and_of_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    AdapterFile(sd1_modules()).write(path)
    report = inspect_file(path)
    data = path.read_bytes()

    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.computed_hash == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert report.stored_hash == report.computed_hash
    assert not report.is_hash_false


def test_a_hash_that_is_not_of_these_tensors_is_told(tmp_path: Path) -> None:
    assert inspect_file(saved(tmp_path / "a.safetensors", {Q: lora()}, {"sshs_model_hash": "0" * 64})).is_hash_false
    assert not inspect_file(saved(tmp_path / "b.safetensors", {Q: lora()})).is_hash_false


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        (("unet.mid_block.attentions.0.proj_in.lora_A.weight", "lora_B.weight"), "PEFT"),
        (("unet.mid_block.attentions.0.proj_in.lora.down.weight", "lora.up.weight"), "older diffusers"),
        (("unet:0:down", "up"), "numbered (2022)"),
    ],
)
def test_the_format_is_named(tmp_path: Path, keys: tuple[str, str], format: str) -> None:
    down, up = keys
    start = down[: len(down) - len({"up": "down"}.get(up, up.replace("up", "down").replace("_B", "_A")))]
    save_file({down: randn(4, 8), start + up: randn(8, 4)}, tmp_path / "a.safetensors")
    report = inspect_file(tmp_path / "a.safetensors")

    assert (report.format, report.spelling) == (format, "")


def test_json_has_all_and_reads_back(tmp_path: Path) -> None:
    evil = {"ss_output_name": "😀 \x1b[31m\u202e", "long": "x" * 10_000}
    report = json.loads(inspect_file(saved(tmp_path / "a.safetensors", sd1_modules(), evil)).to_json())

    assert report["metadata"] == evil
    assert report["readers"]["diffusers"]["verdict"] == "differently"
    assert report["is_hash_false"] is False


def test_the_plot_is_drawn_from_known_blocks(tmp_path: Path) -> None:
    modules = {Q: lora(), PROJ_IN: lora(), K: lora(inputs=768), "lora_unet_strange_layer": lora()}
    report = inspect_file(saved(tmp_path / "a.safetensors", modules))
    plot_inspection(report, tmp_path / "a.png")

    assert list(report.blocks) == ["down 1.0", "other"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_known_block_there_is_nothing_to_plot(tmp_path: Path) -> None:
    report = inspect_file(saved(tmp_path / "a.safetensors", {"lora_unet_strange_layer": lora()}))

    with pytest.raises(UserError, match="nothing to plot"):
        plot_inspection(report, tmp_path / "a.png")
