from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.generation.grid import (
    INK,
    MAX_CELL_PX,
    MIN_CELL_PX,
    PAPER,
    comparison_sheet,
    contact_sheet,
    load_font,
    open_reduced,
    save_sheet,
    wrap,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def box(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of everything in this colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == color).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def is_paper(part: Image.Image) -> bool:
    return bool((np.asarray(part) == PAPER).all())


@pytest.mark.parametrize(
    ("side", "shown"), [(64, MIN_CELL_PX), (100, 200), (256, 256), (512, 512), (1024, MAX_CELL_PX)]
)
def test_small_pictures_are_enlarged_and_large_ones_reduced(side: int, shown: int) -> None:
    left, top, right, bottom = box(contact_sheet([[picture(RED, (side, side))]]), RED)
    assert (right - left, bottom - top) == (shown, shown)


def test_a_picture_shown_at_its_own_size_keeps_every_pixel() -> None:
    values = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    sheet = contact_sheet([[Image.fromarray(values)]])
    margin = (sheet.width - 256) // 2
    assert np.array_equal(np.asarray(sheet)[margin : margin + 256, margin : margin + 256], values)


def test_rows_and_columns_stand_where_they_were_given() -> None:
    sheet = contact_sheet([[picture(RED), None], [None, picture(BLUE)]], ["one", "two"], ["a", "b"], "title")
    red, blue = box(sheet, RED), box(sheet, BLUE)
    assert red[2] < blue[0] and red[3] < blue[1]


def test_pictures_keep_their_shape_in_a_grid_of_mixed_sizes() -> None:
    sheet = contact_sheet([[picture(RED, (96, 64)), picture(BLUE, (64, 96))]])
    left, top, right, bottom = box(sheet, RED)
    assert (right - left) * 64 == (bottom - top) * 96


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize("label", ["step 100", "many words " * 60, "x" * 500, "Кошка 猫"])
def test_labels_never_touch_the_edge_nor_a_picture(side: int, label: str) -> None:
    rows = [[picture(RED, (side, side)), picture(BLUE, (side, side))]] * 2
    sheet = contact_sheet(rows, [label, label], [label, label], title=label)
    edges = [(0, 0, sheet.width, 6), (0, 0, 6, sheet.height), (sheet.width - 6, 0, sheet.width, sheet.height)]
    assert all(is_paper(sheet.crop(edge)) for edge in edges)
    left, top, right, bottom = box(sheet, RED)
    assert is_paper(sheet.crop((left, top - 3, right, top))), "the column label ends above the pictures"
    assert is_paper(sheet.crop((left - 3, top, left, bottom))), "the row label ends left of the pictures"
    first = np.asarray(sheet.crop((left, top, left + (right - left), top + 10)))
    assert (first == RED).all(), "nothing is written over a picture"
    assert (np.asarray(sheet) == INK).all(-1).any(), "the labels are there"


def test_wrapping_keeps_all_words_that_fit_and_marks_what_is_cut() -> None:
    font = load_font(14)
    text = "a red house under a yellow sun by the sea"
    lines = wrap(text, font, 120, 10)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 for line in lines)
    cut = wrap(text, font, 120, 2)
    assert len(cut) == 2 and cut[-1].endswith("…") and font.getlength(cut[-1]) <= 120


def test_a_word_wider_than_the_line_is_broken() -> None:
    font = load_font(14)
    assert "".join(wrap("x" * 90, font, 100, 50)) == "x" * 90


def test_a_comparison_has_a_column_per_variant_and_a_row_per_prompt() -> None:
    sheet = comparison_sheet({"strength 0": [picture(RED), picture(RED)], "1": [picture(BLUE), picture(BLUE)]})
    same = contact_sheet([[picture(RED), picture(BLUE)]] * 2, (), ["strength 0", "1"])
    assert sheet.tobytes() == same.tobytes()


def test_a_sheet_of_a_long_run_stays_small_enough_to_open() -> None:
    sheet = contact_sheet([[picture(RED)] * 100], ["a cat"], [f"step {n * 100}" for n in range(100)])
    assert sheet.width < 12_000


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([[None]])


@pytest.mark.parametrize("num_columns", [1, 20, 25, 60, 100])
def test_a_sheet_of_pictures_opened_as_large_as_they_are_shown_is_that_of_whole_ones(
    num_columns: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (700, 1024, 3), dtype=np.uint8)
    whole = Image.fromarray(values)
    whole.save(tmp_path / "picture.png")
    reduced = open_reduced(tmp_path / "picture.png", num_columns)

    assert reduced is not None and reduced.width <= round(max(96, min(512, 8192 / num_columns)))
    assert open_reduced(tmp_path / "none.png", num_columns) is None
    sheets = [contact_sheet([[picture] * num_columns], ["a cat"]) for picture in (whole, reduced)]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_a_sheet_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    save_sheet(picture(RED), path)
    with pytest.raises(OSError, match="CMYK"):
        save_sheet(Image.new("CMYK", (8, 8)), path)
    assert box(Image.open(path).convert("RGB"), RED) == (0, 0, 64, 64)
