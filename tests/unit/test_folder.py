"""Scanning: where captions, repeats and ids come from, and when a folder is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image, ImageDraw

from lora_diffusion.data.buckets import Bucket, Size, make_buckets
from lora_diffusion.data.captions import CaptionError
from lora_diffusion.data.duplicates import find_near_duplicates
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.folder import Scan, scan_folder, write_report
from lora_diffusion.data.listing import list_folder
from lora_diffusion.data.sidecars import CaptionIndex

T = TypeVar("T")
BUCKETS = make_buckets(Size(64, 64), min_side=32, max_side=128, step=8)


def draw(path: Path, shade: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)
    return path


def captions(scan: Scan) -> dict[str, str]:
    return {sample.image.name: sample.caption for sample in scan.samples}


def kinds(scan: Scan) -> list[str]:
    return [note.kind for note in scan.notes]


def test_a_sample_says_where_how_large_and_how_it_is_cut(tmp_path: Path):
    path = draw(tmp_path / "a.png", size=(200, 100))
    path.with_suffix(".txt").write_text("a red plane")
    (sample,) = scan_folder(tmp_path, buckets=BUCKETS, repeats=3, source=2).samples
    assert (sample.image, sample.caption, sample.repeats, sample.source) == (path, "a red plane", 3, 2)
    assert (sample.size, sample.bucket) == ((200, 100), (88, 40))
    assert sample.fit == ((88, 44), (0, 2))
    assert sample.content == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(sample.id) == 16


def test_ids_depend_on_the_path_in_the_folder_and_the_content_only(tmp_path: Path):
    for root in ("one", "two"):
        draw(tmp_path / root / "sub" / "a.png", 10)
        draw(tmp_path / root / "b.png", 10)
    draw(tmp_path / "two" / "c.png", 30)
    one, two = (
        {s.image.name: s.id for s in scan_folder(tmp_path / root, buckets=BUCKETS).samples} for root in ("one", "two")
    )
    assert one["a.png"] == two["a.png"] and one["b.png"] == two["b.png"]
    assert len(set(two.values())) == 3
    draw(tmp_path / "two" / "b.png", 11)
    assert {s.image.name: s.id for s in scan_folder(tmp_path / "two", buckets=BUCKETS).samples}["b.png"] != two["b.png"]


def test_samples_are_sorted_by_path_through_all_subfolders(tmp_path: Path):
    for index, name in enumerate(("z.png", "b/x.png", "a/y.png", "b/a/w.png")):
        draw(tmp_path / name, index)
    found = [s.image.relative_to(tmp_path).as_posix() for s in scan_folder(tmp_path, buckets=BUCKETS).samples]
    assert found == ["a/y.png", "b/a/w.png", "b/x.png", "z.png"]


@pytest.mark.parametrize(
    ("folder", "repeats", "caption"),
    [
        ("10_sks dog", 20, "sks dog"),
        ("3_sks_dog", 6, "sks_dog"),
        ("2024_summer", 2, ""),
        ("0_none", 2, ""),
        ("dog", 2, ""),
        ("10_sks/close", 20, "sks"),
    ],
)
def test_a_folder_name_with_a_number_gives_repeats_and_a_class_token(
    tmp_path: Path, folder: str, repeats: int, caption: str
):
    draw(tmp_path / folder / "a.png")
    (sample,) = scan_folder(tmp_path, buckets=BUCKETS, repeats=2).samples
    assert (sample.repeats, sample.caption) == (repeats, caption)


def test_the_data_set_folders_own_name_gives_no_repeats(tmp_path: Path):
    draw(tmp_path / "10_dog" / "a.png")
    assert scan_folder(tmp_path / "10_dog", buckets=BUCKETS).samples[0].repeats == 1


def test_a_missing_caption_falls_back_to_default_then_folder_then_nothing_and_is_noted(tmp_path: Path):
    draw(tmp_path / "5_dog" / "a.png")
    draw(tmp_path / "b.png", 1)
    with_default = scan_folder(tmp_path, buckets=BUCKETS, default_caption="a picture")
    assert captions(with_default) == {"a.png": "a picture", "b.png": "a picture"}
    assert kinds(with_default) == ["no caption: default used"] * 2
    without = scan_folder(tmp_path, buckets=BUCKETS)
    assert captions(without) == {"a.png": "dog", "b.png": ""}
    assert kinds(without) == ["no caption: folder name used", "no caption: trained without"]


def test_a_blank_caption_file_counts_as_missing(tmp_path: Path):
    draw(tmp_path / "a.png").with_suffix(".txt").write_text(" \n")
    scan = scan_folder(tmp_path, buckets=BUCKETS, default_caption="a picture")
    assert captions(scan) == {"a.png": "a picture"}
    assert kinds(scan) == ["empty caption file", "no caption: default used"]


def test_txt_wins_over_caption_and_both_win_over_metadata(tmp_path: Path):
    for name in ("a", "b", "c"):
        draw(tmp_path / f"{name}.png", ord(name))
    (tmp_path / "a.txt").write_text("from txt")
    for name in ("a", "b"):
        (tmp_path / f"{name}.caption").write_text("from caption")
    lines = [{"file_name": f"{name}.png", "text": "from metadata"} for name in ("a", "b", "c")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scan = scan_folder(tmp_path, buckets=BUCKETS)
    assert captions(scan) == {"a.png": "from txt", "b.png": "from caption", "c.png": "from metadata"}
    assert kinds(scan) == ["several caption files"] * 2
    assert [note.message for note in scan.notes] == [
        "a.txt is used, not a.caption or its line in metadata.jsonl",
        "b.caption is used, not its line in metadata.jsonl",
    ]


def test_a_metadata_line_that_says_the_same_as_the_text_file_or_nothing_is_not_noted(tmp_path: Path):
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png", ord(name)).with_suffix(".txt").write_text("a  house\n")
    lines = [{"file_name": "a.png", "text": "a  house"}, {"file_name": "b.png", "text": ""}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert kinds(scan_folder(tmp_path, buckets=BUCKETS)) == []


def test_an_empty_text_in_metadata_does_not_hide_the_caption_beside_it(tmp_path: Path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": " ", "caption": "a dog"}')
    scan = scan_folder(tmp_path, buckets=BUCKETS)
    assert captions(scan) == {"a.png": "a dog"}
    assert kinds(scan) == []


def test_metadata_takes_both_common_spellings_tags_and_subfolders(tmp_path: Path):
    for index, name in enumerate(("a.png", "sub/b.png", "sub/c.png")):
        draw(tmp_path / name, index)
    lines = [
        {"file_name": "a.png", "text": "a house"},
        {"image_path": "sub\\b.png", "caption": "a dog", "tags": "brown, small", "image_size": [64, 64]},
    ]
    text = "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\r\n\r\n"
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": null, "tags": "cat"}')
    scan = scan_folder(tmp_path, buckets=BUCKETS)
    assert captions(scan) == {"a.png": "a house", "b.png": "a dog, brown, small", "c.png": "cat"}


def test_a_metadata_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", 1)
    lines = [{"file_name": "a.png", "text": "a house\u2028at\x85night"}, {"file_name": "b.png", "text": "a dog"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    scan = scan_folder(tmp_path, buckets=BUCKETS)
    assert captions(scan) == {"a.png": "a house at night", "b.png": "a dog"}


def test_captions_that_are_gone_since_the_folder_was_listed_are_errors_naming_them(tmp_path: Path):
    draw(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    listing = list_folder(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CaptionError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        CaptionIndex(tmp_path, listing).find(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"metadata\.jsonl: cannot be read \(No such file or directory\)"):
        CaptionIndex(tmp_path, replace(listing, metadata=(tmp_path / "metadata.jsonl",)))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"file_name": "a.png"', "line 2: not a line of JSON"),
        ('["a.png"]', "line 2: not a JSON object"),
        ('{"text": "x"}', "line 2: no file name"),
        ('{"file_name": 3}', "line 2: file_name is int"),
        ('{"file_name": "a.png", "text": ["x"]}', "line 2: text is list"),
        ('{"file_name": "../a.png", "text": "x"}', "outside the data set folder"),
        ('{"file_name": "/a.png", "text": "x"}', "outside the data set folder"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "surrogate"),
        ('{"file_name": "a.png", "text": "\\u0000"}', "NUL"),
    ],
)
def test_a_wrong_metadata_line_is_an_error_that_names_it(tmp_path: Path, line: str, named: str):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(DataError, match=named) as caught:
        scan_folder(tmp_path, buckets=BUCKETS)
    assert "metadata.jsonl" in str(caught.value)


def test_metadata_for_a_picture_that_is_not_there_is_noted(tmp_path: Path):
    draw(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    (note,) = scan_folder(tmp_path, buckets=BUCKETS).notes
    assert (note.kind, "gone.png" in note.message) == ("caption without image", True)


def test_a_folder_that_is_missing_a_file_or_empty_is_an_error_saying_so(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        scan_folder(tmp_path / "gone", buckets=BUCKETS)
    draw(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="is not a folder"):
        scan_folder(tmp_path / "one" / "a.png", buckets=BUCKETS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        scan_folder(tmp_path / "empty", buckets=BUCKETS)


def test_a_folder_of_bad_images_is_an_error_with_the_table_of_reasons(tmp_path: Path):
    for index in range(30):
        (tmp_path / f"{index:02d}.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="none of its 30 images can be used") as caught:
        scan_folder(tmp_path, buckets=BUCKETS, max_left_out=1.0)
    assert "  00.png  not a picture but an HTML page" in str(caught.value)
    assert "… and 10 more" in str(caught.value)


@pytest.mark.parametrize(("bad", "is_error"), [(1, False), (2, True)])
def test_more_than_a_fifth_of_unusable_images_is_an_error(tmp_path: Path, bad: int, is_error: bool):
    for index in range(4):
        draw(tmp_path / f"good{index}.png", index)
    for index in range(bad):
        (tmp_path / f"bad{index}.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("no image, so it does not count")
    if is_error:
        with pytest.raises(DataError, match="2 of 6 images cannot be used"):
            scan_folder(tmp_path, buckets=BUCKETS)
    else:
        assert len(scan_folder(tmp_path, buckets=BUCKETS).samples) == 4


def test_progress_counts_the_images(tmp_path: Path):
    seen: list[tuple[int, str]] = []

    def track(items: Sequence[T], description: str) -> Iterable[T]:
        seen.append((len(items), description))
        return items

    for index in range(3):
        draw(tmp_path / f"{index}.png", index)
    scan_folder(tmp_path, buckets=BUCKETS, track=track)
    assert seen == [(3, "Reading images")]


def test_the_report_says_which_captions_are_cut(tmp_path: Path):
    draw(tmp_path / "set" / "a.png", 1).with_suffix(".txt").write_text("short")
    draw(tmp_path / "set" / "b.png", 2).with_suffix(".txt").write_text("long")
    scan = scan_folder(tmp_path / "set", buckets=[Bucket(64, 64)], repeats=5)
    write_report(tmp_path / "dataset.json", [scan], {"short": 75, "long": 76}, max_tokens=75)
    report = json.loads((tmp_path / "dataset.json").read_text())
    assert [(entry["tokens"], entry["is_caption_cut"]) for entry in report["used"]] == [(75, False), (76, True)]
    assert report["summary"] == {
        "images": 2,
        "images_per_epoch": 10,
        "left_out": 0,
        "captions_cut": 1,
        "max_tokens": 75,
        "buckets": {"64x64": 2},
        "notes": {},
    }


@pytest.mark.parametrize(
    ("spoilt", "level", "told"),
    [
        ("", "INFO", "Files left out: 0, without a caption: 0, captions cut at 75 tokens: 0."),
        ("a picture", "WARNING", "Files left out: 1, without a caption: 0, captions cut at 75 tokens: 0."),
        ("a caption file", "WARNING", "Files left out: 0, without a caption: 1, captions cut at 75 tokens: 0."),
        ("a caption", "WARNING", "Files left out: 0, without a caption: 0, captions cut at 75 tokens: 1."),
    ],
)
def test_writing_the_report_tells_how_much_there_is_to_mend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: str, level: str, told: str
):
    for index in range(6):
        draw(tmp_path / "set" / f"{index}.png", index).with_suffix(".txt").write_text(str(index))
    if spoilt == "a picture":
        (tmp_path / "set" / "bad.png").write_text("<html>")
    if spoilt == "a caption file":
        (tmp_path / "set" / "0.txt").unlink()
    counts = {str(index): 76 if spoilt == "a caption" and not index else 1 for index in range(6)}
    with caplog.at_level("INFO", "lora_diffusion"):
        write_report(tmp_path / "dataset.json", [scan_folder(tmp_path / "set", buckets=BUCKETS)], counts, 75)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage() == f"Data set: 6 pictures. {told} See {tmp_path / 'dataset.json'}."


def test_resaved_and_resized_copies_are_near_duplicates_and_other_drawings_are_not(tmp_path: Path):
    for index in range(8):
        image = Image.new("RGB", (96, 96), "white")
        pen = ImageDraw.Draw(image)
        pen.ellipse((8 * index, 20, 8 * index + 30, 60), fill=(30 * index, 90, 20))
        pen.rectangle((60 - 7 * index, 50, 90 - 7 * index, 85), fill=(20, 30 * index, 160))
        image.save(tmp_path / f"{index}.png")
        if index == 3:
            image.save(tmp_path / "3_resaved.jpg", quality=80)
            image.resize((72, 72)).save(tmp_path / "3_resized.png")
            image.save(tmp_path / "3_same.png")
    samples = scan_folder(tmp_path, buckets=BUCKETS).samples
    pairs = {frozenset(path.name for path in pair) for pair in find_near_duplicates(samples)}
    copies = ["3.png", "3_resaved.jpg", "3_resized.png", "3_same.png"]
    expected = {frozenset((a, b)) for a in copies for b in copies if a < b} - {frozenset(("3.png", "3_same.png"))}
    assert pairs == expected  # pictures with equal bytes are the scan's to report


def test_near_duplicates_of_no_pictures_are_none(tmp_path: Path):
    draw(tmp_path / "a.png")
    (sample,) = scan_folder(tmp_path, buckets=BUCKETS).samples
    assert find_near_duplicates([]) == find_near_duplicates([sample]) == []
    assert find_near_duplicates([sample, replace(sample, image=tmp_path / "gone.png")]) == []
