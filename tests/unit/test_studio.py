"""What the pages Generate and Adapters rest on: prompt and sliders, the library, metadata, drawings, settings."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from lora_diffusion.container import read_header, with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.generation.infotext import png_bytes, read_parameters, save_png, write_parameters
from lora_diffusion.generation.request import Request, take_out_tags
from lora_diffusion.workspace import Workspace
from webui.services.adapter_edit import Description, copy_to_library, edit
from webui.services.drawing_form import DrawingForm
from webui.services.drawings import (
    KEPT_SHEETS,
    MAX_WAITING,
    Desk,
    Drawing,
    NoLongerWanted,
    Progress,
    Report,
    Stopped,
)
from webui.services.file_tools import FileTools, ToolError, checked_name
from webui.services.gallery import Gallery
from webui.services.library import Library, matching, tags_in
from webui.services.places import Places
from webui.services.prompt_tags import Tagged, has_words, set_strength, stack_of, toggle_words, without
from webui.services.studio import settle
from webui.services.trash import move_to_trash

INK = Path(__file__).parents[2] / "samples" / "adapters" / "ink.safetensors"


@pytest.fixture()
def places(tmp_path: Path) -> Places:
    for folder in ("adapters", "runs", "samples/adapters"):
        (tmp_path / folder).mkdir(parents=True)
    return Places(Workspace(tmp_path))


@pytest.fixture()
def library(places: Places) -> Library:
    return Library(places, places.workspace.private / "library.json")


# ---- Prompt and sliders ----


def test_a_slider_changes_the_tag_where_it_stands() -> None:
    assert set_strength("a <lora:ink:0.8> house", "ink", 0.35) == "a <lora:ink:0.35> house"


def test_a_new_adapter_goes_to_the_end() -> None:
    assert set_strength("a house", "ink", 1.0) == "a house <lora:ink:1>"


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.35, 1.0, 1.5, -0.5])
def test_what_a_slider_writes_is_what_the_stack_and_the_engine_read(strength: float) -> None:
    prompt = set_strength("x <lora:ink:1> y <lora:ink:2> <lora:neon:0.5>", "ink", strength)

    assert stack_of(prompt) == [Tagged("ink", strength), Tagged("neon", 0.5)]
    assert take_out_tags(prompt)[1] == {"ink": strength, "neon": 0.5}


def test_a_tag_that_is_being_typed_has_no_strength_yet() -> None:
    assert stack_of("a <lora:ink:> <lora:neon>") == [Tagged("ink", None), Tagged("neon", 1.0)]


def test_removing_an_adapter_leaves_the_rest_of_the_prompt() -> None:
    assert without("a <lora:ink:1> house <lora:neon:1>", "ink") == "a house <lora:neon:1>"


def test_trigger_words_are_put_in_and_taken_out_again() -> None:
    with_words = toggle_words("a house, red", "sks style")

    assert with_words == "sks style, a house, red"
    assert has_words(with_words, "SKS style")
    assert toggle_words(with_words, "sks style") == "a house, red"


# ---- Library ----


def test_the_library_lists_files_of_all_folders_and_says_why_a_file_is_broken(places: Places, library: Library) -> None:
    root = places.root
    shutil.copy(INK, root / "samples" / "adapters")
    shutil.copy(INK, root / "adapters" / "ink.safetensors")
    (root / "adapters" / "cut.safetensors").write_bytes(INK.read_bytes()[:5000])
    (root / "adapters" / "page.safetensors").write_text("<html>not found</html>")
    (root / "runs" / "one").mkdir()
    shutil.copy(INK, root / "runs" / "one" / "ink-000200.safetensors")

    found = {adapter.name: adapter for adapter in library.adapters()}

    assert set(found) == {"cut", "page", "ink", "ink-000200", "ink 2"}
    ink, of_run = found["ink"], found["ink-000200"]
    assert (ink.facts.family, ink.facts.kind, ink.facts.rank, ink.source) == ("sd1", "lora", "16", "library")
    assert (of_run.source, of_run.run, of_run.step, found["ink 2"].source) == ("run", "runs/one", 200, "sample")
    assert "cut short" in found["cut"].facts.error and str(root) not in found["cut"].facts.error
    assert "not a safetensors file" in found["page"].facts.error
    assert [it.name for it in matching(list(found.values()), "ink", "sd1", "lora", "run")] == ["ink-000200"]


def test_a_date_at_the_end_of_a_run_s_name_is_no_step(places: Places, library: Library) -> None:
    run = places.root / "runs" / "dated"
    run.mkdir()
    (run / "config.toml").write_text('[run]\nname = "cat-241101"\n')
    for name in ("cat-241101", "cat-241101-000200"):
        shutil.copy(INK, run / f"{name}.safetensors")

    steps = {adapter.name: adapter.step for adapter in library.adapters()}

    assert steps == {"cat-241101": None, "cat-241101-000200": 200}


def test_two_thousand_files_are_listed_within_two_seconds_once_they_are_known(places: Places, library: Library) -> None:
    for number in range(2000):
        os.link(_shared(places), places.root / "adapters" / f"{number:04d}.safetensors")
    library.adapters()
    again = Library(places, places.workspace.private / "library.json")  # as after a restart

    start = time.monotonic()
    found = again.adapters()

    assert len(found) == 2000
    assert time.monotonic() - start < 2.0


def test_tags_that_cannot_be_counted_hide_no_file(places: Places, library: Library) -> None:
    path = places.root / "adapters" / "odd.safetensors"
    for tags in ('{"a": {"t": 1e400}}', "[" * 200_000, '{"a": {"": 3, "cat": 2}}'):
        path.write_bytes(with_metadata(INK.read_bytes(), {"ss_tag_frequency": tags}))
        facts = library.named("odd").facts
        assert (facts.error, facts.tags) == ("", ("cat",) if "cat" in tags else ())


def test_the_library_is_filtered_by_family_tag_and_words(places: Places, library: Library) -> None:
    given = dict(read_header(INK).metadata)
    for name, tags in (("a", "ink, comic"), ("b", "comic"), ("c", "comics")):
        data = with_metadata(INK.read_bytes(), given | {"modelspec.tags": tags, "modelspec.title": f"Title {name * 3}"})
        (places.root / "adapters" / f"{name}.safetensors").write_bytes(data)
    adapters = library.adapters()

    def names(*filters: str) -> list[str]:
        return [adapter.name for adapter in matching(adapters, *filters)]

    assert tags_in(adapters) == ["comic", "comics", "ink"]
    assert names("", "", "", "", "comic") == ["a", "b"]
    assert names("title bbb", "", "", "", "comic") == ["b"]
    assert names("", "sd1", "lora", "library", "ink") == ["a"]
    assert names("", "sdxl") == names("", "", "dora") == names("", "", "", "run") == []


def test_a_file_is_read_again_when_it_changes(places: Places, library: Library) -> None:
    path = places.root / "adapters" / "a.safetensors"
    path.write_bytes(b"no")
    assert library.adapters()[0].facts.error
    shutil.copy(INK, path)

    assert not library.adapters()[0].facts.error


def test_links_and_ids_do_not_lead_out_of_the_library(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    (root / "adapters").mkdir(parents=True)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(INK, outside)
    (root / "adapters" / "link.safetensors").symlink_to(outside)
    library = Library(Places(Workspace(root)), root / "cache.json")

    assert library.adapters() == []
    for id in (
        "../outside.safetensors",
        str(outside),
        "adapters/link.safetensors",
        "adapters/../../outside.safetensors",
    ):
        assert library.find(id) is None


@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "a\\b", ".hidden", "_preview", "a:b", "a\nb", "x" * 200])
def test_a_name_of_a_new_file_is_no_path(name: str) -> None:
    with pytest.raises(UserError):
        checked_name(name)


def test_nothing_is_overwritten_by_a_new_file(places: Places) -> None:
    from webui.services.file_tools import FileTools

    (places.root / "adapters" / "there.safetensors").touch()

    with pytest.raises(ToolError, match="there already"):
        FileTools(places.workspace).target("there")


# ---- Metadata ----


def test_editing_metadata_keeps_every_byte_of_the_tensors(places: Places, library: Library) -> None:
    path = places.root / "adapters" / "ink.safetensors"
    shutil.copy(INK, path)
    before = read_header(path)

    edit(library.adapters()[0], Description("Tusche", "ink style", "ink, <b>line</b>", "Lines."))

    after = read_header(path)
    assert path.read_bytes()[after.data_start :] == INK.read_bytes()[before.data_start :]
    assert after.tensors == before.tensors
    assert after.metadata["modelspec.trigger_phrase"] == "ink style"
    kept = {key: value for key, value in before.metadata.items() if key.startswith("ss")}
    assert kept.items() <= after.metadata.items()
    facts = library.adapters()[0].facts
    assert (facts.title, facts.trigger, facts.tags) == ("Tusche", "ink style", ("ink", "<b>line</b>"))


def test_an_empty_field_takes_the_key_out_and_shipped_files_are_left_alone(places: Places, library: Library) -> None:
    shutil.copy(INK, places.root / "adapters" / "a.safetensors")
    shutil.copy(INK, places.root / "samples" / "adapters" / "b.safetensors")
    mine, shipped = library.adapters()

    edit(mine, Description("", "", "", ""))

    assert "modelspec.title" not in read_header(mine.path).metadata
    with pytest.raises(UserError, match="Copy it to the library"):
        edit(shipped, Description("x", "", "", ""))


def test_a_copy_takes_a_free_name_and_the_trash_keeps_both(places: Places, library: Library) -> None:
    shutil.copy(INK, places.root / "samples" / "adapters" / "ink.safetensors")
    adapter = library.adapters()[0]

    first, second = copy_to_library(places.workspace, adapter), copy_to_library(places.workspace, adapter)

    assert (first.name, second.name) == ("ink.safetensors", "ink 2.safetensors")
    assert first.read_bytes() == INK.read_bytes()
    trashed = [move_to_trash(places.workspace, first), copy_to_library(places.workspace, adapter)]
    assert move_to_trash(places.workspace, trashed[1]).name == "ink 2.safetensors"
    assert trashed[0].is_file()


def test_a_copy_can_be_read_by_whom_any_new_file_can(places: Places, library: Library) -> None:
    shutil.copy(INK, places.root / "samples" / "adapters" / "ink.safetensors")
    (places.root / "plain").touch()

    copy = copy_to_library(places.workspace, library.adapters()[0])

    assert copy.stat().st_mode == (places.root / "plain").stat().st_mode


def test_a_copy_that_fails_leaves_nothing_behind(places: Places, library: Library) -> None:
    source = places.root / "samples" / "adapters" / "ink.safetensors"
    shutil.copy(INK, source)
    adapter = library.adapters()[0]
    source.unlink()

    with pytest.raises(FileNotFoundError):
        copy_to_library(places.workspace, adapter)

    assert list(places.workspace.adapters.iterdir()) == []


def test_a_merge_that_was_looked_at_is_saved_as_if_merged_under_its_new_name(places: Places) -> None:
    tools = FileTools(places.workspace)
    previewed, target = tools.preview_file("3fa2b1"), tools.target("my mix")
    names = {"ss_output_name": previewed.stem, "modelspec.title": previewed.stem}
    metadata = {**read_header(INK).metadata, **names}
    previewed.write_bytes(with_metadata(INK.read_bytes(), metadata))

    tools.keep_preview(previewed, target)

    saved, data = read_header(target), target.read_bytes()
    renamed = {"ss_output_name": "my mix", "modelspec.title": "my mix"}
    hashed = {key: text for key, text in (metadata | renamed).items() if key.startswith("ss_")}
    hashed = with_metadata(data, hashed)[0x100000:0x110000]
    legacy_hash = hashlib.sha256(hashed).hexdigest()[:8]
    assert saved.metadata == metadata | renamed | {"sshs_legacy_hash": legacy_hash}
    assert data[saved.data_start :] == INK.read_bytes()[read_header(INK).data_start :]
    assert not previewed.exists()


# ---- Drawings ----


class StubEngine:
    """Draws grey squares; `gate` holds it back after the first."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def draw(self, base: str, requests: Sequence[Request], report: Report, stopped: Stopped) -> Iterator[bytes]:
        for number, request in enumerate(requests):
            report(Progress("drawing", 0, 1, 2))
            while number and not self.gate.wait(0.01):
                if stopped():
                    raise NoLongerWanted
            yield png_bytes(Image.new("RGB", (8, 8)), write_parameters(request, base, {}))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pictures_are_on_disk_with_their_settings_before_the_drawing_is_done(places: Places) -> None:
    engine = StubEngine()
    desk = Desk(places.workspace, engine)
    requests = [Request("a house", seed=seed, size=(8, 8), adapters={"ink": 0.5}) for seed in (4, 5)]

    drawing = desk.add("pictures", "base", requests)
    until(lambda: _now(desk, drawing).num_done == 1)
    picture = Gallery(places).newest()[0]

    assert picture.parameters is not None and picture.parameters.request == requests[0]
    engine.gate.set()
    until(lambda: _now(desk, drawing).phase == "done")
    assert [it.parameters.request.seed for it in Gallery(places).newest() if it.parameters] == [5, 4]


def test_cancelling_lets_the_next_drawing_start_and_keeps_what_is_done(places: Places) -> None:
    engine = StubEngine()
    desk = Desk(places.workspace, engine)
    first = desk.add("pictures", "base", [Request("a", seed=seed) for seed in range(3)])
    second = desk.add("pictures", "base", [Request("b", seed=9)])
    until(lambda: _now(desk, first).num_done == 1)

    desk.cancel(first.id)
    until(lambda: _now(desk, second).phase == "done")

    assert _now(desk, first).phase == "cancelled"
    assert len(Gallery(places).newest()) == 2


def test_the_cells_of_the_newest_sheets_are_kept_and_no_other_folder_is_touched(places: Places) -> None:
    cells = places.workspace.pictures / "cells"
    folders = [cells / f"20200101-0000{second:02d}-1" for second in range(KEPT_SHEETS + 3)]
    for folder in (*folders, cells / "mine"):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"")
    outside = places.root / "outside"
    outside.mkdir()
    (cells / "20190101-000000-1").symlink_to(outside)
    desk = Desk(places.workspace, StubEngine())

    drawing = desk.add("trial", "base", [Request("a")])
    until(lambda: _now(desk, drawing).phase == "done")

    left = {path for path in cells.iterdir() if path.name.startswith("2020")}
    assert left == set(folders[4:])  # with the new one there are KEPT_SHEETS
    assert (cells / "mine" / "a.png").is_file() and (cells / "20190101-000000-1").is_symlink()
    newest = _now(desk, drawing).pictures[0]
    assert newest is not None and newest.is_file()


def test_the_line_is_bounded_and_says_so(places: Places) -> None:
    desk = Desk(places.workspace, StubEngine())
    for seed in range(MAX_WAITING):
        desk.add("pictures", "base", [Request("a", seed=seed)] * 2)

    with pytest.raises(UserError, match="Busy: 64 drawings"):
        desk.add("pictures", "base", [Request("a", seed=1)])
    assert len(desk.unfinished()) == MAX_WAITING
    desk.cancel()
    until(lambda: not desk.unfinished())
    assert desk.add("pictures", "base", [Request("a", seed=1)])
    desk.cancel()


def test_the_gallery_shows_its_folder_only(places: Places) -> None:
    save_png(Image.new("RGB", (8, 8)), places.root / "outside.png", "x\nSteps: 1")
    (places.workspace.pictures).mkdir()
    gallery = Gallery(places)

    for id in ("outside.png", "pictures/../outside.png", str(places.root / "outside.png"), "pictures", "\0"):
        assert gallery.find(id) is None


def test_a_picture_with_a_tag_that_is_none_does_not_break_the_gallery(places: Places) -> None:
    places.workspace.pictures.mkdir()
    save_png(Image.new("RGB", (8, 8)), places.workspace.pictures / "odd.png", "x <lora:ink:0.5:0.7>\nSteps: 1")
    assert [picture.parameters for picture in Gallery(places).newest()] == [None]


def test_settings_of_a_picture_find_an_adapter_by_its_hash_and_list_unknown_ones(
    places: Places, library: Library
) -> None:
    shutil.copy(INK, places.root / "adapters" / "renamed.safetensors")
    digits = read_header(INK).metadata["sshs_model_hash"]
    request = Request("a house", adapters={"ink": 0.7, "gone": 1.0}, size=(64, 64))
    text = write_parameters(request, "base", {"ink": digits, "gone": "ab" * 32})

    settled, unknown = settle(read_parameters(text), library)

    assert settled.prompt == "a house <lora:renamed:0.7>"
    assert unknown == ["gone (abababababab)"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"seed": -1},
        {"cfg": float("nan")},
        {"count": 10**6},
        {"width": 100_000},
        {"width": None},
        {"prompt": "x" * 10**6},
    ],
)
def test_the_server_has_limits_of_its_own(wrong: dict[str, object]) -> None:
    values = {"prompt": "a", "negative": "", "steps": 20, "cfg": 5, "sampler": "ddim", "clip_skip": 1, "count": 1}
    values |= {"width": 64, "height": 64, "seed": 1, "seed_mode": "fixed"}

    assert DrawingForm(**values).requests() == [Request("a", steps=20, cfg=5, seed=1, size=(64, 64))]  # pyright: ignore
    with pytest.raises(UserError):
        DrawingForm(**(values | wrong)).requests()  # pyright: ignore


def test_a_thumbnail_in_a_file_is_drawn_anew_and_nothing_else_is_sent(places: Places) -> None:
    from webui.services.site import make_site
    from webui.services.thumbnails import data_uri, thumbnail_of

    picture = places.root / "p.png"
    Image.new("RGB", (600, 300), "red").save(picture)
    path = places.root / "adapters" / "a.safetensors"
    path.write_bytes(with_metadata(INK.read_bytes(), {"modelspec.thumbnail": data_uri(picture)}))
    site = make_site(places.root)

    assert thumbnail_of(site, "adapters/a.safetensors", 320)[8:12] == b"WEBP"
    script = "data:image/svg+xml;base64,PHN2Zz48c2NyaXB0Lz48L3N2Zz4="
    path.write_bytes(with_metadata(INK.read_bytes(), {"modelspec.thumbnail": script}))
    with pytest.raises(UserError):
        thumbnail_of(site, "adapters/a.safetensors", 320)


def test_a_photo_that_its_camera_turned_is_upright_as_a_thumbnail(tmp_path: Path) -> None:
    from webui.services.thumbnails import data_uri

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.jpg", exif=turned)
    content = base64.b64decode(data_uri(tmp_path / "a.jpg").partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (30, 60)


def _now(desk: Desk, drawing: Drawing) -> Drawing:
    found = desk.get(drawing.id)
    assert found is not None
    return found


def _shared(places: Places) -> Path:
    path = places.root / "shared"
    if not path.exists():
        shutil.copy(INK, path)
    return path
