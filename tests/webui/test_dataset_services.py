"""Captions edited, undone, filtered and checked; folders confined. No browser."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_diffusion.config import DatasetConfig
from lora_diffusion.data.buckets import Size
from lora_diffusion.errors import UserError
from lora_diffusion.models.load import load_model
from lora_diffusion.recipe_data import buckets_of
from lora_diffusion.workspace import Workspace
from tests.tiny import make_tiny_sd1, make_tiny_sdxl
from webui.services.caption_text import Edit, diff, histogram, plan, style_of
from webui.services.crops import buckets_for, crop_view
from webui.services.datasets import Datasets
from webui.services.facts import look_at_header
from webui.services.places import Places
from webui.services.regex_guard import RegexError, replace_in_all
from webui.services.tokens import find_counter

SHIPPED = Path(__file__).parents[2] / "samples"
SET = "data/set"


@pytest.fixture()
def datasets(tmp_path: Path) -> Datasets:
    """Six pictures: 0 without a caption, 5 with a `.caption`, the rest with `.txt`."""
    folder = tmp_path / SET
    folder.mkdir(parents=True)
    for number in range(6):
        noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
        noise.save(folder / f"{number}.png")
        if number:
            suffix = ".caption" if number == 5 else ".txt"
            (folder / f"{number}{suffix}").write_text(f"cat, red, number {number}\n")
    return Datasets(Places(Workspace(tmp_path)))


def folder_of(datasets: Datasets) -> Path:
    return datasets.places.root / SET


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def looked_at(datasets: Datasets) -> None:
    datasets.open(SET)
    datasets.look(SET)
    while not datasets.look(SET)["isDone"]:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (Edit("replace", "red", "blue"), "red cat, reddish", "blue cat, bluedish"),
        (Edit("replace", "RED", "blue", ignore_case=True), "red cat", "blue cat"),
        (Edit("replace", r"(\w+) cat", r"cat of \1", is_regex=True), "red cat", "cat of red"),
        (Edit("replace", "a.b", r"\1"), "a.b axb", r"\1 axb"),
        (Edit("add", "dog"), "cat", "cat, dog"),
        (Edit("add", "dog", at_end=False), "cat", "dog, cat"),
        (Edit("add", "dog"), "", "dog"),
        (Edit("remove", "Cat, blue"), "cat, red", "red"),
        (Edit("prefix", "sks style"), "a cat", "sks style a cat"),
        (Edit("suffix", ", ink"), "a cat", "a cat, ink"),
        (Edit("sort"), "b, C, a", "a, b, C"),
        (Edit("dedupe"), "cat, red, Cat", "cat, red"),
        (Edit("set", "new\nlines"), "old", "new lines"),
    ],
)
def test_an_edit_does_what_it_says(edit: Edit, before: str, after: str) -> None:
    assert [change.after for change in plan({"a": before}, edit)] == [after]


@pytest.mark.parametrize("edit", [Edit("add", "cat"), Edit("remove", "dog"), Edit("prefix", "cat"), Edit("dedupe")])
def test_an_edit_that_changes_nothing_is_not_listed(edit: Edit) -> None:
    assert plan({"a": "cat, red"}, edit) == []


@pytest.mark.parametrize("edit", [Edit("replace", ""), Edit("fly", "x"), Edit("set", "x" * 3000)])
def test_an_edit_without_sense_is_refused(edit: Edit) -> None:
    with pytest.raises(UserError):
        plan({"a": "cat"}, edit)


def test_a_pattern_that_takes_for_ever_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(RegexError, match="stopped"):
        replace_in_all(r"(a+)+$", "x", ["a" * 60 + "!"], time_limit_s=0.5)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("pattern", "to"), [("(", "x"), ("a", r"\9"), ("x" * 5000, "y")])
def test_a_pattern_that_is_wrong_is_explained(pattern: str, to: str) -> None:
    with pytest.raises(RegexError):
        replace_in_all(pattern, to, ["a"])


def test_a_replacement_that_explodes_is_stopped() -> None:
    with pytest.raises(RegexError, match="grow"):
        replace_in_all(r".", "x" * 400, ["a" * 1000])


def test_a_diff_holds_both_texts() -> None:
    pieces = diff("a red cat", "a blue cat, asleep")

    assert "".join(text for sign, text in pieces if sign != "+") == "a red cat"
    assert "".join(text for sign, text in pieces if sign != "-") == "a blue cat, asleep"
    assert ("-", "red") in pieces


def test_histograms_count_captions_and_not_occurrences() -> None:
    assert histogram(["cat, cat, red", "red"], "tags") == [("red", 2), ("cat", 1)]
    assert histogram(["A cat. The cat's hat"], "words") == [("cat", 1), ("cat's", 1), ("hat", 1), ("the", 1)]
    assert [style_of(text) for text in ("a, b c, d", "a photo of a big red cat in the sun", "cat")] == [
        "tags",
        "sentence",
        "",
    ]


def test_a_caption_goes_to_the_file_it_came_from(datasets: Datasets) -> None:
    pictures = {path.name: path.read_bytes() for path in folder_of(datasets).glob("*.png")}
    datasets.open(SET)
    datasets.save(SET, "0.png", None, "new")
    datasets.save(SET, "5.png", "cat, red, number 5", "five")

    assert (folder_of(datasets) / "0.txt").read_text() == "new\n"
    assert (folder_of(datasets) / "5.caption").read_text() == "five\n"
    assert not (folder_of(datasets) / "5.txt").exists()
    assert {path.name: path.read_bytes() for path in folder_of(datasets).glob("*.png")} == pictures


def test_a_caption_that_was_changed_elsewhere_is_not_written_over(datasets: Datasets) -> None:
    datasets.open(SET)
    (folder_of(datasets) / "1.txt").write_text("from another program")
    answer = datasets.save(SET, "1.png", "cat, red, number 1", "mine")

    assert "elsewhere" in answer["error"]
    assert answer["rows"][0]["caption"] == "from another program"
    assert (folder_of(datasets) / "1.txt").read_text() == "from another program"


def test_a_save_may_be_sent_again_when_its_answer_was_lost(datasets: Datasets) -> None:
    datasets.open(SET)
    first = datasets.save(SET, "1.png", "cat, red, number 1", "mine")
    again = datasets.save(SET, "1.png", "cat, red, number 1", "mine")

    assert "error" not in again
    assert again["rows"] == first["rows"]
    assert [row["caption"] for row in again["rows"]] == ["mine"]
    assert again["levels"] == first["levels"], "nothing was written the second time"


def test_a_copy_that_a_restart_ended_is_told(datasets: Datasets) -> None:
    with pytest.raises(UserError, match="started anew while the copy was made"):
        datasets.mending(SET)


def test_what_was_done_is_undone_and_done_again_after_a_restart(datasets: Datasets) -> None:
    folder = folder_of(datasets)
    states = [bytes_of(folder)]
    for edit in ({"kind": "add", "text": "dog"}, {"kind": "replace", "text": "red", "to": "blue"}, {"kind": "sort"}):
        names = [row["name"] for row in datasets.open(SET)["pictures"]]
        preview = datasets.preview(SET, names, edit)
        datasets.apply(SET, names, edit, preview["digest"])
        states.append(bytes_of(folder))
    again = Datasets(datasets.places)
    for state in reversed(states[:-1]):
        again.undo(SET)
        assert bytes_of(folder) == state
    with pytest.raises(UserError):
        again.undo(SET)
    for state in states[1:]:
        again.undo(SET, again=True)
        assert bytes_of(folder) == state
    assert len(states) == 4
    assert len({tuple(sorted(state.items())) for state in states}) == 4


def test_undo_leaves_alone_what_was_changed_since(datasets: Datasets) -> None:
    names = [row["name"] for row in datasets.open(SET)["pictures"]]
    edit = {"kind": "add", "text": "dog"}
    datasets.apply(SET, names, edit, datasets.preview(SET, names, edit)["digest"])
    (folder_of(datasets) / "2.txt").write_text("by hand")

    assert datasets.undo(SET)["left"] == ["2.txt"]
    assert (folder_of(datasets) / "2.txt").read_text() == "by hand"
    assert (folder_of(datasets) / "3.txt").read_text() == "cat, red, number 3\n"
    assert not (folder_of(datasets) / "0.txt").exists()


def test_the_keystrokes_of_one_caption_are_one_step(datasets: Datasets) -> None:
    datasets.open(SET)
    datasets.save(SET, "1.png", "cat, red, number 1", "c")
    datasets.save(SET, "1.png", "c", "ca")

    assert datasets.undo(SET)["levels"]["undo"] == 0
    assert (folder_of(datasets) / "1.txt").read_text() == "cat, red, number 1\n"


def test_a_preview_that_is_out_of_date_is_not_applied(datasets: Datasets) -> None:
    datasets.open(SET)
    edit = {"kind": "add", "text": "dog"}
    preview = datasets.preview(SET, ["1.png"], edit)
    (folder_of(datasets) / "1.txt").write_text("other")

    with pytest.raises(UserError, match="preview"):
        datasets.apply(SET, ["1.png"], edit, preview["digest"])
    assert (folder_of(datasets) / "1.txt").read_text() == "other"


@pytest.mark.parametrize(
    "id", ["../outside", "/etc", "runs", ".lora-diffusion", "data/../..", "data/link", "", "data/\0"]
)
def test_folders_elsewhere_are_refused(datasets: Datasets, id: str) -> None:
    root = datasets.places.root
    (root / "runs").mkdir()
    (root.parent / "outside").mkdir(exist_ok=True)
    (root / "data" / "link").symlink_to(root.parent / "outside")
    with pytest.raises(UserError):
        datasets.open(id)


def test_a_caption_that_is_a_link_out_is_never_written(datasets: Datasets, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("untouched")
    (folder_of(datasets) / "0.txt").symlink_to(secret)
    rows = datasets.open(SET)["pictures"]
    answer = datasets.save(SET, rows[0]["name"], rows[0]["caption"], "mine")

    assert "error" in answer
    assert secret.read_text() == "untouched"
    assert rows[0]["caption"] is None


def test_checks_find_what_is_wrong_and_filters_show_it(datasets: Datasets) -> None:
    folder = folder_of(datasets)
    (folder / "broken.png").write_text("<html>")
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    drawing = Image.open(SHIPPED / "neon" / "01-cat.png").convert("RGB")
    drawing.save(folder / "drawing.png")
    drawing.resize((200, 200)).save(folder / "resaved.jpg", quality=95)
    turned = Image.new("RGB", (40, 80), "red")
    turned.save(folder / "turned.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    Image.new("RGBA", (64, 64)).save(folder / "clear.png")
    Image.new("RGB", (600, 20), "blue").save(folder / "long.png")
    (folder / "orphan.txt").write_text("nobody")
    looked_at(datasets)

    def names(check: str) -> set[str]:
        rows = datasets.open(SET)["pictures"]
        return {rows[number]["name"] for number in datasets.view(SET, {"check": check}, 64)["shown"]}

    assert names("unreadable") == {"broken.png"}
    assert names("twins") == {"1.png", "copy.png"}
    assert {"drawing.png", "resaved.jpg"} <= names("near")
    assert names("rotated") == {"turned.jpg"}
    assert names("alpha") == {"clear.png"}
    assert "long.png" in names("extreme")
    assert {"0.png", "copy.png", "clear.png"} <= names("uncaptioned")
    assert [name for name, _ in datasets.open(SET)["orphans"]] == ["orphan.txt"]
    assert look_at_header(folder / "turned.jpg").width == 80


def test_tags_filter_with_and_without(datasets: Datasets) -> None:
    rows = datasets.open(SET)["pictures"]

    def names(**chosen: object) -> list[str]:
        return [rows[number]["name"] for number in datasets.view(SET, {"by": "tags", **chosen})["shown"]]

    assert names(wanted=["number 2"]) == ["2.png"]
    assert names(unwanted=["cat"]) == ["0.png"]
    assert names(text="NUMBER 3") == ["3.png"]
    assert names(wanted=["cat"], unwanted=["number 1", "number 2"]) == ["3.png", "4.png", "5.png"]


def test_a_mended_copy_leaves_the_original_as_it_was(datasets: Datasets) -> None:
    folder = folder_of(datasets)
    (folder / "broken.png").write_text("<html>")
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    Image.new("RGBA", (64, 64)).save(folder / "clear.png")
    before = bytes_of(folder)
    looked_at(datasets)
    datasets.mend(SET, "mended", {"without_twins": True, "upright": True, "opaque": True})
    while not datasets.mending(SET)["isDone"]:
        time.sleep(0.05)
    copy = bytes_of(datasets.places.root / "data" / "mended")

    assert bytes_of(folder) == before
    assert copy["1.png"] == before["1.png"]
    assert {"broken.png", "copy.png"}.isdisjoint(copy)
    assert copy["5.txt"] == b"cat, red, number 5\n"
    assert Image.open(datasets.places.root / "data" / "mended" / "clear.png").mode == "RGB"


def test_the_crop_is_that_of_the_training() -> None:
    crop = crop_view(Size(1024, 512), buckets_for(512, 64))

    assert crop.bucket == (704, 320)
    assert crop.lost == pytest.approx(1 - (320 / 352), abs=0.01)
    assert (crop.left, crop.width) == (0, 1)
    assert crop.top == pytest.approx(16 / 352, abs=1e-3)
    with pytest.raises(UserError):
        buckets_for(10_000, 64)


def test_buckets_are_those_of_the_bases_for_a_resolution(datasets: Datasets) -> None:
    looked_at(datasets)
    steps = {side: datasets.view(SET, {}, resolution=side)["step"] for side in (64, 512, 768, 1024)}

    assert steps == {64: 32, 512: 64, 768: 64, 1024: 32}


@pytest.mark.parametrize("make", [make_tiny_sd1, make_tiny_sdxl])
def test_buckets_are_those_of_the_base_that_is_given_as_training_makes_them(
    datasets: Datasets, make: Callable[[Path], Path]
) -> None:
    looked_at(datasets)
    model = load_model(str(make(datasets.places.root / "models" / "b")), dtype=torch.float32)
    table = DatasetConfig(path=Path("x"), resolution=512)

    seen = datasets.view(SET, {}, resolution=512, base="models/b")

    assert seen["base"] == "b"
    assert {name for name, _ in seen["buckets"]} <= {f"{it.width}×{it.height}" for it in buckets_of(table, model)}
    assert seen["step"] == model.resolution_step
    chosen = datasets.view(SET, {}, resolution=512, step=8, base="models/b")
    assert (chosen["step"], chosen["base"]) == (8, ""), "what is chosen on the page counts"


@pytest.mark.parametrize(("has_sizes", "step"), [(False, 64), (True, 32)])
def test_a_single_file_says_which_step_its_family_has(datasets: Datasets, has_sizes: bool, step: int) -> None:
    looked_at(datasets)
    names = ["input_blocks.0.0.weight", *(["label_emb.0.0.weight"] if has_sizes else [])]
    base = datasets.places.root / "models" / "one.safetensors"
    base.parent.mkdir()
    save_file({f"model.diffusion_model.{name}": torch.zeros(1) for name in names}, base)

    assert datasets.view(SET, {}, resolution=768, base="models/one.safetensors")["step"] == step


@pytest.mark.parametrize(
    "base", ["", "models/none", "../other", "a/b", "\0", "models/empty", "models/adapter.safetensors"]
)
def test_a_base_that_does_not_say_its_step_leaves_the_usual_one(datasets: Datasets, base: str) -> None:
    looked_at(datasets)
    (datasets.places.root / "models" / "empty").mkdir(parents=True)
    (datasets.places.root / "models" / "empty" / "model_index.json").write_text("{}")
    save_file({"lora": torch.zeros(1)}, datasets.places.root / "models" / "adapter.safetensors")

    seen = datasets.view(SET, {}, resolution=512, base=base)

    assert (seen["step"], seen["base"]) == (64, "")


def test_tokens_are_counted_as_the_trainer_does(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    (tmp_path / "samples").symlink_to(SHIPPED)
    plain = tmp_path / "models" / "plain" / "tokenizer"
    counter = find_counter(Workspace(tmp_path))
    plain.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (plain / name).write_bytes((SHIPPED / "base" / "tokenizer" / name).read_bytes())
    from_parts = find_counter(Workspace(tmp_path))
    assert counter and from_parts and from_parts.source == "models/plain/tokenizer"
    reference = CLIPTokenizer.from_pretrained(str(SHIPPED / "base" / "tokenizer"))

    for text in ("a photo of a purple cat, neon style", "It's 12 o'clock!", "äöü  日本", ""):
        expected = len(reference(text, add_special_tokens=False).input_ids)
        assert counter.count(text) == from_parts.count(text) == expected, text


def test_an_upload_arrives_in_pieces_and_only_if_it_is_what_its_name_says(datasets: Datasets) -> None:
    id = datasets.make_set("new one")
    data = (folder_of(datasets) / "1.png").read_bytes()
    half = len(data) // 2

    def send(name: str, piece: bytes, offset: int, last: bool) -> str:
        return datasets.upload(id, name, base64.b64encode(piece).decode(), offset, is_last=last)

    send("../../a.png", data[:half], 0, False)
    assert not (datasets.places.root / id / "a.png").exists()
    send("a.png", data[half:], half, True)
    assert (datasets.places.root / id / "a.png").read_bytes() == data
    for name, content in (
        ("b.png", b"<html>"),
        ("b.exe", b"x"),
        (".b.png", data),
        ("a.png", data),
        ("c.txt", b"\xff\0"),
    ):
        with pytest.raises(UserError):
            send(name, content, 0, True)
    for bad in ("", "../x", "a/b", "new one", "x" * 200):
        with pytest.raises(UserError):
            datasets.make_set(bad)
    with pytest.raises(UserError):
        datasets.upload("samples", "a.png", "", 0, is_last=True)
    assert sorted(path.name for path in (datasets.places.root / id).iterdir()) == ["a.png"]


def test_a_picture_that_is_added_later_is_looked_at_when_the_set_is_opened_again(datasets: Datasets) -> None:
    looked_at(datasets)
    (folder_of(datasets) / "late.png").write_text("<html>")
    looked_at(datasets)

    assert datasets.view(SET, {})["checks"]["unreadable"] == 1


def test_the_choice_leaves_out_links_that_lead_out(
    datasets: Datasets, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (8, 8)).save(outside / "a.png")
    (datasets.places.root / "data" / "link").symlink_to(outside)

    assert [(one["id"], one["images"], one["captioned"]) for one in datasets.all()] == [(SET, 6, 5)]
