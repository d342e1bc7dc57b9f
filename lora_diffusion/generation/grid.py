"""Contact sheets: pictures in labelled rows and columns, as one picture."""

from __future__ import annotations

import importlib.util
import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_diffusion.files import write_bytes_atomically

PAPER = (250, 250, 248)
INK = (34, 36, 40)
FAINT = (226, 226, 222)
ELLIPSIS = "…"

MIN_CELL_PX = 192
MAX_CELL_PX = 512
MAX_SIDE_PX = 8192
"""Long runs have many columns; beyond this the cells shrink, to no less than `MIN_CELL_PX` // 2."""

_COLUMN_LABEL_LINES = 2

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Pictures in a grid on a light ground; None leaves a cell empty.

    Small pictures are enlarged, so that labels have room and details show; large ones are reduced to 512 px. Labels
    that are too long are wrapped, then cut with an ellipsis. Raises ValueError when there is no picture at all.
    """
    pictures = [picture for row in rows for picture in row if picture is not None]
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    layout = _Layout.of(pictures, len(rows), max(len(row) for row in rows), row_labels, column_labels, title)
    sheet = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        line = _fit_line(title, layout.title_font, layout.size[0] - 2 * layout.margin)
        draw.text((layout.margin, layout.margin), line, INK, font=layout.title_font)
    for column, text in enumerate(column_labels):
        _draw_column_label(draw, layout, column, text)
    for row, text in enumerate(row_labels):
        _draw_row_label(draw, layout, row, text)
    for row, cells in enumerate(rows):
        for column, picture in enumerate(cells):
            _place(sheet, layout, row, column, picture)
    return sheet


def comparison_sheet(
    columns: Mapping[str, Sequence[Image.Image | None]], row_labels: Sequence[str] = (), title: str = ""
) -> Image.Image:
    """Variants side by side: one column per label ("strength 0", "0.5", "1"), one row per prompt."""
    num_rows = max((len(pictures) for pictures in columns.values()), default=0)
    rows = [[pictures[i] if i < len(pictures) else None for pictures in columns.values()] for i in range(num_rows)]
    return contact_sheet(rows, row_labels, list(columns), title)


def open_reduced(path: Path | None, num_cells: int) -> Image.Image | None:
    """A picture no larger than it is shown in a sheet of `num_cells` rows or columns; None if there is no such file.

    Raises OSError if it cannot be read.
    """
    if path is None or not path.exists():
        return None
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = min(1.0, _max_cell_px(num_cells) / max(picture.size))
    size = _fitted(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    write_bytes_atomically(path, file.getvalue())


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below one another, as one picture."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (width, height), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


@dataclass(frozen=True)
class _Layout:
    """Where everything goes, in pixels."""

    cell: tuple[int, int]
    num_rows: int
    num_columns: int
    text_px: int
    row_label_width: int
    column_label_lines: int
    has_title: bool

    @classmethod
    def of(
        cls,
        pictures: Sequence[Image.Image],
        num_rows: int,
        num_columns: int,
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        title: str,
    ) -> _Layout:
        widest, tallest = max(p.width for p in pictures), max(p.height for p in pictures)
        scale = _cell_scale(max(widest, tallest), max(num_rows, num_columns))
        cell = (max(1, round(widest * scale)), max(1, round(tallest * scale)))
        text_px = min(22, max(13, max(cell) // 16))
        font = load_font(text_px)
        lines = max((len(wrap(text, font, cell[0], _COLUMN_LABEL_LINES)) for text in column_labels), default=0)
        room = max(170, round(cell[0] * 0.8))
        row_lines = [line for text in row_labels for line in wrap(text, font, room, _row_lines(cell, text_px))]
        width = max((int(font.getlength(line)) + 1 for line in row_lines), default=0)
        return cls(cell, num_rows, num_columns, text_px, width, lines, bool(title))

    @cached_property
    def font(self) -> Font:
        return load_font(self.text_px)

    @cached_property
    def title_font(self) -> Font:
        return load_font(round(self.text_px * 1.35), bold=True)

    @property
    def margin(self) -> int:
        return self.text_px

    @property
    def gap(self) -> int:
        return max(6, self.text_px // 2)

    @property
    def line_height(self) -> int:
        return round(self.text_px * 1.3)

    @property
    def row_label_lines(self) -> int:
        return _row_lines(self.cell, self.text_px)

    @property
    def left(self) -> int:
        """Of the first column's pictures."""
        return self.margin + (self.row_label_width + self.margin if self.row_label_width else 0)

    @property
    def top(self) -> int:
        """Of the first row's pictures."""
        title = round(self.text_px * 1.35 * 1.3) + self.gap if self.has_title else 0
        labels = self.column_label_lines * self.line_height + self.gap if self.column_label_lines else 0
        return self.margin + title + labels

    @property
    def size(self) -> tuple[int, int]:
        width = self.left + self.num_columns * (self.cell[0] + self.gap) - self.gap + self.margin
        height = self.top + self.num_rows * (self.cell[1] + self.gap) - self.gap + self.margin
        return width, height

    def corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.cell[0] + self.gap), self.top + row * (self.cell[1] + self.gap)


def wrap(text: str, font: Font, width_px: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `width_px`; what does not fit ends in an ellipsis.

    Breaks at spaces, and inside a word only where the word alone is wider than a line.
    """
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < max_lines:
        line = words.pop(0)
        if font.getlength(line) > width_px:
            line, rest = _split_word(line, font, width_px)
            words.insert(0, rest)
        else:
            while words and font.getlength(f"{line} {words[0]}") <= width_px:
                line = f"{line} {words.pop(0)}"
        lines.append(line)
    if words:
        lines[-1] = _cut_line(lines[-1], font, width_px)
    return lines


def load_font(size_px: int, *, bold: bool = False) -> Font:
    """DejaVu Sans, which has Cyrillic and Greek too, from matplotlib's files if they are there; else Pillow's own."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        path = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if path.exists():
            return ImageFont.truetype(str(path), size_px)
    return ImageFont.load_default(size_px)


def _cell_scale(side: int, num_cells: int) -> float:
    """Small pictures are enlarged by a whole factor, which keeps every line of pixels equally wide."""
    scale = float(-(-MIN_CELL_PX // side)) if side < MIN_CELL_PX else 1.0
    return min(scale, _max_cell_px(num_cells) / side)


def _max_cell_px(num_cells: int) -> float:
    return min(MAX_CELL_PX, max(MAX_SIDE_PX / num_cells, MIN_CELL_PX / 2))


def _row_lines(cell: tuple[int, int], text_px: int) -> int:
    return max(1, cell[1] // round(text_px * 1.3))


def _split_word(word: str, font: Font, width_px: int) -> tuple[str, str]:
    count = max(1, bisect_right(range(len(word)), width_px, key=lambda n: font.getlength(word[:n])) - 1)
    return word[:count], word[count:]


def _cut_line(line: str, font: Font, width_px: int) -> str:
    line = line[: bisect_right(range(len(line) + 1), width_px, key=lambda n: font.getlength(line[:n] + ELLIPSIS)) - 1]
    return line.rstrip(" ,.;:") + ELLIPSIS


def _fit_line(text: str, font: Font, width_px: int) -> str:
    text = " ".join(text.split())
    return text if font.getlength(text) <= width_px else _cut_line(text, font, width_px)


def _draw_column_label(draw: ImageDraw.ImageDraw, layout: _Layout, column: int, text: str) -> None:
    """Centred over its column, the last line just above the pictures."""
    lines = wrap(text, layout.font, layout.cell[0], layout.column_label_lines)
    left, top = layout.corner(0, column)
    y = top - layout.gap - len(lines) * layout.line_height
    for line in lines:
        draw.text((left + layout.cell[0] / 2, y), line, INK, font=layout.font, anchor="ma")
        y += layout.line_height


def _draw_row_label(draw: ImageDraw.ImageDraw, layout: _Layout, row: int, text: str) -> None:
    """Left of its row, centred on the pictures' height."""
    lines = wrap(text, layout.font, layout.row_label_width, layout.row_label_lines)
    _, top = layout.corner(row, 0)
    y = top + (layout.cell[1] - len(lines) * layout.line_height) / 2
    for line in lines:
        draw.text((layout.margin, y), line, INK, font=layout.font)
        y += layout.line_height


def _fitted(picture: Image.Image, cell: tuple[int, int]) -> tuple[int, int]:
    """The picture's size in a cell, in its own shape."""
    scale = min(cell[0] / picture.width, cell[1] / picture.height)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _place(sheet: Image.Image, layout: _Layout, row: int, column: int, picture: Image.Image | None) -> None:
    left, top = layout.corner(row, column)
    width, height = layout.cell
    if picture is None:
        ImageDraw.Draw(sheet).rectangle((left, top, left + width - 1, top + height - 1), outline=FAINT)
        return
    size = _fitted(picture, layout.cell)
    picture = picture.convert("RGB")
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))
