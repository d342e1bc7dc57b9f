"""A folder of everything that people's data sets hold by mistake, and the verdict on each file."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.data.buckets import Size, make_buckets
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.folder import Scan, scan_folder, write_report

BUCKETS = make_buckets(Size(64, 64), min_side=32, max_side=128, step=8)
CANARY = "canary-7f3a"
RED, BLUE = (255, 0, 0), (0, 0, 255)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and odd names need a POSIX file system")


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(index: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A noisy picture, different for each index."""
    count = size[0] * size[1] * 3
    return Image.frombytes("RGB", size, bytes((i * 7919 + index * 31 >> 3) % 256 for i in range(count)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def png_with_text_bomb(data: bytes) -> bytes:
    """Put a compressed text of 80 MB before the pixels."""
    text = b"Comment\0\0" + zlib.compress(b"a" * 80_000_000)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return data[:33] + chunk + data[33:]


def flip_bit(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :]


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


LEFT_OUT = {
    "zero_byte.png": "empty file",
    "truncated.jpg": "damaged or cut off",
    "truncated.png": "damaged or cut off",
    "truncated.webp": "",
    "without_end.png": "damaged or cut off",
    "html.png": "an HTML page",
    "lfs.png": "git lfs pull",
    "json.jpg": "a JSON text",
    "svg.png": "an SVG drawing",
    "zip.png": "a ZIP archive",
    "random.png": "not a picture, or damaged",
    "zeros.png": "nothing but zero bytes",
    "heic.jpg": "convert it to PNG or JPEG",
    "photo.heic": "convert it to PNG or JPEG",
    "bit_flip.png": "damaged or cut off",
    "bomb_65000.png": "decompression bomb",
    "bomb_100000.png": "decompression bomb",
    "bomb_10000.png": "decompression bomb",
    "text_bomb.png": "damaged or cut off",
    "float.tiff": "floating-point",
    "wide.tiff": "more than 16 bits",
    "pixel.png": "too small",
    "sliver.png": "too long and thin",
    "link_out.png": "leads out of the data set folder",
    "link_broken.png": "does not exist",
    "link_loop.png": "in a circle",
    "link_folder": "leads out of the data set folder",
    "link_self": "a link to a folder",
    "link_caption.txt": "leads out of the data set folder",
    "pipe.png": "a named pipe",
    "folder.png": "a folder, not a file",
    "caption_latin1.png": "byte 3 is not UTF-8",
    "caption_utf16_without_mark.png": "is NUL",
    "caption_nul.png": "is NUL",
    "notes.md": "neither a picture nor a caption",
}

CAPTIONS = {  # used pictures: name -> (caption file or None, what is trained)
    "plain.png": (b"a red house", "a red house"),
    "caption_missing.png": (None, ""),
    "caption_empty.png": (b"", ""),
    "caption_blank.png": (b" \n\t\r\n", ""),
    "caption_bom.png": (b"\xef\xbb\xbfa red house", "a red house"),
    "caption_crlf.png": (b"a red house\r\nat night\r\n", "a red house at night"),
    "caption_utf16.png": ("a red house".encode("utf-16"), "a red house"),
    "caption_huge.png": (b"red house " * 100_000, ("red house " * 2000)),
    "caption_syntax.png": (b"a {red|blue} ((house)) <lora:x:1>", "a {red|blue} ((house)) <lora:x:1>"),
    "caption_ansi.png": (b"\x1b[31mred <script>", "\x1b[31mred <script>"),
    "with spaces.png": (b"spaces", "spaces"),
    "-dash.png": (b"dash", "dash"),
    "quote'\".png": (b"quotes", "quotes"),
    "percent%s$(x).png": (b"percent", "percent"),
    "line\nbreak.png": (b"line break", "line break"),
    "ünïcode 家.png": (b"unicode", "unicode"),
    "x" * 246 + ".png": (b"long", "long"),
    "UPPER.PNG": (b"upper", "upper"),
}

UPRIGHT = {"exif_2.png": (80, 40), "exif_3.jpg": (80, 40), "exif_6.jpg": (40, 80), "exif_broken.jpg": (80, 40)}


def fill_with_used(folder: Path) -> None:
    for index, (name, (caption, _)) in enumerate(CAPTIONS.items()):
        (folder / name).write_bytes(encode(picture(index)))
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    wide = Image.new("RGB", (80, 40), RED)
    for name, orientation in [("exif_2.png", 2), ("exif_3.jpg", 3), ("exif_6.jpg", 6)]:
        data = encode(wide, "JPEG" if name.endswith("jpg") else "PNG", exif=exif(orientation))
        (folder / name).write_bytes(data)
    (folder / "exif_broken.jpg").write_bytes(encode(wide, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    (folder / "grey16.png").write_bytes(encode(Image.new("I;16", (64, 64), 30000)))
    (folder / "rgba.png").write_bytes(encode(Image.new("RGBA", (64, 64), (*RED, 0))))
    (folder / "la.png").write_bytes(encode(Image.new("LA", (64, 64), (9, 0))))
    (folder / "palette.png").write_bytes(encode(picture(70).quantize(8), transparency=0))
    (folder / "cmyk.jpg").write_bytes(encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"))
    (folder / "trailing.png").write_bytes(encode(picture(71)) + b"\0" * 999)
    (folder / "icc.png").write_bytes(encode(picture(72), icc_profile=b"nonsense" * 20))
    (folder / "really_a_jpeg.png").write_bytes(encode(picture(73), "JPEG"))
    frames = [picture(80), picture(81)]
    (folder / "animated.gif").write_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    (folder / "animated.png").write_bytes(encode(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    (folder / "animated.webp").write_bytes(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    (folder / "copy_1.png").write_bytes(encode(picture(90)))
    (folder / "copy_2.png").write_bytes(encode(picture(90)))
    (folder / "twin.png").write_bytes(encode(picture(91)))
    (folder / "twin.jpg").write_bytes(encode(picture(91), "JPEG"))
    (folder / "twin.txt").write_text("twins")
    (folder / "small.png").write_bytes(encode(picture(92, (16, 16))))
    (folder / "panorama.png").write_bytes(encode(picture(93, (600, 60))))
    (folder / "nfd_e\u0301.png").write_bytes(encode(picture(94)))
    (folder / "nfd_\u00e9.txt").write_text("composed")
    (folder / "link_inside.png").symlink_to("plain.png")
    (folder / "orphan.txt").write_text("nothing belongs to this")


def fill_with_unusable(folder: Path, outside: Path) -> None:
    png, jpeg, webp = (encode(picture(100), format) for format in ("PNG", "JPEG", "WEBP"))
    contents = {
        "zero_byte.png": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "without_end.png": png[:-12],
        "html.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "json.jpg": b'{"error": "not found"}',
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "zip.png": b"PK\x03\x04" + b"\0" * 60,
        "random.png": bytes(i * 7919 % 251 for i in range(5000)),
        "zeros.png": b"\0" * 5000,
        "heic.jpg": b"\0\0\0\x18ftypheic" + b"\0" * 60,
        "photo.heic": b"\0\0\0\x18ftypheic" + b"\0" * 60,
        "bit_flip.png": flip_bit(png, len(png) // 2),
        "bomb_65000.png": png_header(65000, 65000),
        "bomb_100000.png": png_header(100_000, 100_000),
        "bomb_10000.png": png_header(10_000, 10_000),
        "text_bomb.png": png_with_text_bomb(png),
        "float.tiff": encode(Image.new("F", (64, 64), 0.5), "TIFF"),
        "wide.tiff": encode(Image.new("I", (64, 64), 1_000_000), "TIFF"),
        "pixel.png": encode(Image.new("RGB", (1, 1))),
        "sliver.png": encode(Image.new("RGB", (4000, 4))),
        "caption_latin1.png": encode(picture(101)),
        "caption_latin1.txt": b"caf\xe9",
        "caption_utf16_without_mark.png": encode(picture(102)),
        "caption_utf16_without_mark.txt": "house".encode("utf-16-le"),
        "caption_nul.png": encode(picture(103)),
        "caption_nul.txt": b"a\0b",
        "notes.md": b"about these pictures",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (outside / "secret.png").write_bytes(encode(picture(104)))
    (outside / "secret.txt").write_text(CANARY)
    (folder / "link_out.png").symlink_to(outside / "secret.png")
    (folder / "link_broken.png").symlink_to("nowhere.png")
    (folder / "link_loop.png").symlink_to("link_loop.png")
    (folder / "link_folder").symlink_to(outside)
    (folder / "link_self").symlink_to(".")
    (folder / "link_caption.txt").symlink_to(outside / "secret.txt")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()


def fill_with_ignored(folder: Path) -> None:
    for name in ("._plain.png", "Thumbs.db", ".DS_Store", ".hidden.png", "upload.png.tmp", "desktop.ini"):
        (folder / name).write_bytes(b"\0\0")
    (folder / ".git").mkdir()
    (folder / ".git" / "inside.png").write_bytes(b"")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "plain.png").write_bytes(b"")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    fill_with_used(folder)
    fill_with_unusable(folder, tmp_path_factory.mktemp("outside"))
    fill_with_ignored(folder)
    return folder


@pytest.fixture(scope="module")
def scan(corpus: Path) -> Scan:
    return scan_folder(corpus, buckets=BUCKETS, max_left_out=1.0)


def notes_of(scan: Scan, name: str) -> set[str]:
    return {note.kind for note in scan.notes if note.path.name == name}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_unusable_file_is_left_out_with_its_reason(scan: Scan, name: str):
    assert name not in {sample.image.name for sample in scan.samples}
    reasons = [item.reason for item in scan.left_out if item.path.name == name]
    assert len(reasons) == 1
    assert LEFT_OUT[name] in reasons[0]


def test_nothing_else_is_left_out(scan: Scan):
    assert {item.path.name for item in scan.left_out} == set(LEFT_OUT)
    assert len(LEFT_OUT) == 35


def test_every_file_is_used_or_left_out_or_noted_or_ignored(scan: Scan, corpus: Path):
    used = {sample.image.name for sample in scan.samples}
    seen = used | set(LEFT_OUT) | {note.path.name for note in scan.notes}
    rest = {name for name in os.listdir(corpus) if name not in seen}
    captions = {name for name in rest if name.endswith(".txt")}
    assert rest - captions == {
        "._plain.png", "Thumbs.db", ".DS_Store", ".hidden.png", "upload.png.tmp", "desktop.ini", ".git", "__MACOSX",
    }  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_usable_picture_is_used_with_its_caption(scan: Scan, name: str):
    (sample,) = (sample for sample in scan.samples if sample.image.name == name)
    assert sample.caption == CAPTIONS[name][1]
    assert sample.bucket == (64, 64)


@pytest.mark.parametrize("name", UPRIGHT)
def test_the_size_is_that_of_the_upright_picture(scan: Scan, name: str):
    (sample,) = (sample for sample in scan.samples if sample.image.name == name)
    assert sample.size == UPRIGHT[name]
    assert (sample.bucket.width > sample.bucket.height) == (UPRIGHT[name][0] > UPRIGHT[name][1])


@pytest.mark.parametrize(
    "name",
    ["grey16.png", "rgba.png", "la.png", "palette.png", "cmyk.jpg", "trailing.png", "icc.png", "really_a_jpeg.png"],
)
def test_odd_but_whole_picture_is_used(scan: Scan, name: str):
    assert [sample.image.name for sample in scan.samples].count(name) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("caption_missing.png", "no caption: trained without"),
        ("caption_empty.png", "no caption: trained without"),
        ("caption_empty.png", "empty caption file"),
        ("caption_blank.png", "empty caption file"),
        ("caption_huge.png", "caption cut"),
        ("animated.gif", "animated"),
        ("animated.png", "animated"),
        ("animated.webp", "animated"),
        ("copy_2.png", "duplicate"),
        ("twin.png", "same name"),
        ("small.png", "enlarged"),
        ("panorama.png", "cropped"),
        ("link_inside.png", "duplicate"),
        ("orphan.txt", "caption without image"),
    ],
)
def test_what_a_person_should_know_is_noted(scan: Scan, name: str, kind: str):
    assert kind in notes_of(scan, name) | notes_of(scan, "plain.png" if name == "link_inside.png" else name)


def test_a_good_picture_gets_no_note(scan: Scan):
    assert not notes_of(scan, "with spaces.png")


def test_a_caption_is_found_although_accents_are_encoded_differently(scan: Scan):
    assert [s.caption for s in scan.samples if s.image.name.startswith("nfd_")] == ["composed"]


def test_pictures_that_share_a_name_share_the_caption_but_nothing_else(scan: Scan):
    twins = [sample for sample in scan.samples if sample.image.stem == "twin"]
    assert [sample.caption for sample in twins] == ["twins", "twins"]
    assert len({sample.id for sample in twins}) == len({sample.content for sample in twins}) == 2


def test_duplicates_have_equal_contents_and_different_ids(scan: Scan):
    copies = [sample for sample in scan.samples if sample.image.name.startswith("copy_")]
    assert len({sample.content for sample in copies}) == 1
    assert len({sample.id for sample in copies}) == 2


def test_nothing_outside_the_folder_is_read(scan: Scan):
    assert CANARY not in repr(scan)


def test_the_report_lists_every_file_as_printable_json(scan: Scan, tmp_path: Path):
    write_report(tmp_path / "dataset.json", [scan], {"a red house": 3}, max_tokens=75)
    report = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert report["summary"]["images"] == len(report["used"]) == len(scan.samples)
    assert report["summary"]["left_out"] == len(report["left_out"]) == len(LEFT_OUT)
    assert report["summary"]["notes"]["no caption: trained without"] == sum(
        note.kind == "no caption: trained without" for note in scan.notes
    )
    names = [entry["file"] for entry in report["used"] + report["left_out"]]
    assert all(name.isprintable() for name in names)
    assert any(name.endswith("line\\nbreak.png") for name in names)


def test_the_default_limit_stops_a_folder_as_bad_as_this_one(corpus: Path):
    with pytest.raises(DataError, match=r"of \d+ images cannot be used, more than 20%") as caught:
        scan_folder(corpus, buckets=BUCKETS)
    assert "html.png" in str(caught.value)
    assert "and 1" in str(caught.value)  # … more rows than the table shows


def test_a_name_that_is_not_utf8_is_left_out_and_its_report_can_be_written(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "good.png").write_bytes(encode(picture(0)))
    name = os.fsencode(tmp_path / "set") + b"/bad\xff.png"
    try:
        Path(os.fsdecode(name)).write_bytes(encode(picture(1)))
        Path(os.fsdecode(name) + "_folder").mkdir()
        Path(os.fsdecode(name) + "_folder/a.png").write_bytes(encode(picture(2)))
    except OSError:
        pytest.skip("this file system only takes UTF-8 names")
    scan = scan_folder(tmp_path / "set", buckets=BUCKETS, max_left_out=0.5)
    assert [(item.path.name, item.reason) for item in scan.left_out] == [
        ("bad\udcff.png", "the name is not valid UTF-8; rename it"),
        ("bad\udcff.png_folder", "the name is not valid UTF-8; rename it"),
    ]
    write_report(tmp_path / "dataset.json", [scan], {}, max_tokens=75)
    assert "bad\\\\udcff.png" in (tmp_path / "dataset.json").read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read everything")
def test_a_file_without_read_permission_is_left_out(tmp_path: Path):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(encode(picture(index)))
    (tmp_path / "0.png").chmod(0)
    scan = scan_folder(tmp_path, buckets=BUCKETS, max_left_out=0.5)
    assert [item.reason for item in scan.left_out] == ["cannot be read (Permission denied)"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read everything")
def test_a_picture_whose_caption_has_no_read_permission_is_left_out(tmp_path: Path):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(encode(picture(index)))
    (tmp_path / "0.txt").write_text("a red house")
    (tmp_path / "0.txt").chmod(0)
    (left_out,) = scan_folder(tmp_path, buckets=BUCKETS, max_left_out=0.5).left_out
    assert left_out.path.name == "0.png"
    assert "0.txt: cannot be read (Permission denied)" in left_out.reason


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path):
    (tmp_path / "good.png").write_bytes(encode(picture(0)))
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "lie.png").write_bytes(png_header(65_000, 65_000))
    unit = 1 if sys.platform == "darwin" else 1024
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, time.monotonic()
    scan = scan_folder(tmp_path, buckets=BUCKETS, max_left_out=1.0)
    assert len(scan.left_out) == 2
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 100e6
