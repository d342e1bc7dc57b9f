"""Cosines between adapters: against dense arithmetic, and where the answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_diffusion.adapters.geometry import geometry_of
from lora_diffusion.errors import UserError
from lora_diffusion.tools.deltas import delta_of
from lora_diffusion.tools.overlap import overlap_of_files, plot_overlap
from tests.adapter_parts import (
    CONV,
    LDM_Q,
    TE,
    TE1,
    K,
    Parts,
    Q,
    loha,
    lokr,
    lora,
    randn,
    saved,
    sd1_modules,
    sdxl_modules,
)


def file(tmp_path: Path, name: str, modules: dict[str, Parts]) -> Path:
    return saved(tmp_path / f"{name}.safetensors", modules)


def scaled(modules: dict[str, Parts], factor: float) -> dict[str, Parts]:
    return {name: parts | {"alpha": factor * parts["alpha"]} for name, parts in modules.items()}


def test_with_itself_an_adapter_has_1_with_its_negative_minus_1_at_any_strength(tmp_path: Path) -> None:
    a = file(tmp_path, "a", sd1_modules())
    b, c = (file(tmp_path, name, scaled(sd1_modules(), factor)) for name, factor in (("b", 0.25), ("c", -2.0)))
    overlap = overlap_of_files([a, b, c])

    expected = [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    for matrix in (overlap.whole, *overlap.by_block.values()):
        torch.testing.assert_close(torch.tensor(matrix), torch.tensor(expected), rtol=0, atol=1e-6)
    assert list(overlap.by_block) == ["down 1.0", "text 1"]
    assert [(x, y) for x, y, _ in overlap.alike] == [("a", "b")]


def test_changes_of_other_columns_or_other_modules_have_0(tmp_path: Path) -> None:
    left, right = lora(), lora()
    left["lora_down.weight"][:, :4] = 0
    right["lora_down.weight"][:, 4:] = 0
    paths = [file(tmp_path, name, {Q: parts}) for name, parts in (("a", left), ("b", right))]
    paths.append(file(tmp_path, "c", {TE: lora()}))
    overlap = overlap_of_files(paths)

    torch.testing.assert_close(torch.tensor(overlap.whole), torch.eye(3), rtol=0, atol=1e-7)
    assert overlap.alike == []


def test_all_kinds_agree_with_dense_arithmetic(tmp_path: Path) -> None:
    adapters = [
        {Q: lora(), CONV: loha(columns=72)},
        {Q: loha(), TE: lora()},
        {Q: lokr("factored"), CONV: loha(12, 72, 3)},
    ]
    overlap = overlap_of_files([file(tmp_path, f"{i}", modules) for i, modules in enumerate(adapters)])
    flat = []
    for modules in adapters:
        pieces = []
        for name, columns in ((Q, 8), (CONV, 72), (TE, 8)):
            parts = modules.get(name)
            shapes = {part: tuple(tensor.shape) for part, tensor in (parts or {}).items()}
            delta = delta_of(parts, geometry_of(shapes)) if parts else torch.zeros(12, columns)
            pieces.append(delta.double().flatten())
        flat.append(torch.cat(pieces))
    units = torch.stack([vector / vector.norm() for vector in flat])

    torch.testing.assert_close(torch.tensor(overlap.whole, dtype=torch.float64), units @ units.T, rtol=0, atol=1e-6)
    assert abs(overlap.whole[0][1]) > 1e-3


def test_names_are_compared_whatever_their_spelling(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a", sdxl_modules(ldm=True)), file(tmp_path, "b", sdxl_modules(ldm=False))
    c = file(tmp_path, "c", {K: lora(inputs=768), TE: lora()})
    d = file(tmp_path, "d", {K: lora(inputs=768), TE1: lora()})

    assert overlap_of_files([a, b]).whole[0][1] == pytest.approx(1)
    assert overlap_of_files([c, d]).whole[0][1] == pytest.approx(1)


def test_an_adapter_that_changes_nothing_has_no_direction(tmp_path: Path) -> None:
    empty = lora()
    empty["lora_up.weight"].zero_()
    overlap = overlap_of_files([file(tmp_path, "a", {Q: lora()}), file(tmp_path, "b", {Q: empty})])

    assert json.loads(overlap.to_json())["whole"] == [[pytest.approx(1.0), None], [None, None]]
    plot_overlap(overlap, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    paths = [
        file(tmp_path, "a", {Q: lora()}),
        file(tmp_path / "old", "a", {Q: lora()}),
        file(tmp_path, "b", {Q: lora()}),
    ]

    assert overlap_of_files(paths).names == ("a (1)", "a (2)", "b")


def test_modules_of_another_model_are_compared_too(tmp_path: Path) -> None:
    path = file(tmp_path, "a", {"lora_unet_strange_layer": lora()})

    overlap = overlap_of_files([path, path])

    assert list(overlap.by_block) == ["other"]
    assert overlap.by_block["other"][0][1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (sdxl_modules(ldm=True), "is made for SDXL, .*a.safetensors for SD 1.x"),
        ({Q: lora(outputs=24)}, "layer of 24 x 8.*one of 12 x 8"),
        ({LDM_Q: lora(outputs=24)}, "layer of 24 x 8.*one of 12 x 8"),
        ({Q: lora() | {"dora_scale": randn(1, 8)}}, "cannot compare a DoRA"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, other: dict[str, Parts], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        overlap_of_files([file(tmp_path, "a", sd1_modules()), file(tmp_path, "b", other)])


def test_one_file_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two files or more"):
        overlap_of_files([file(tmp_path, "a", {Q: lora()})])
