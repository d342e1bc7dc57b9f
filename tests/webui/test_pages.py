"""The built app without a browser: events are named, components can be found, services see only the workspace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import pytest
from gradio import Checkbox, File, Request, Slider, State, Textbox, Timer
from gradio.components import Component
from gradio.components.api_component import Api
from PIL import Image
from pydantic import BaseModel

from lora_diffusion.config import TrainConfig
from lora_diffusion.data.listing import IMAGE_SUFFIXES
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from webui.app import PAGES, build
from webui.pages.train import Handlers
from webui.services.datasets import Datasets
from webui.services.facts import look_at_header
from webui.services.glance import Glance, glance
from webui.services.overview import Overview, differences
from webui.services.pictures import PictureError
from webui.services.places import OutsideError
from webui.services.preflight import check
from webui.services.presets import presets
from webui.services.site import Site, make_site
from webui.translate import LANGUAGES, Translator

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def site(workspace: Workspace) -> Site:
    return make_site(workspace.root, queue=Queue(workspace, start_runner=lambda _: None))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(make_site(tmp_path_factory.mktemp("empty")), "en")


def test_every_event_has_a_name_or_is_private(demo: Any) -> None:
    events = list(demo.fns.values())

    assert len(events) > 20
    for event in events:
        assert event.api_visibility == "private" or (event.api_name and not str(event.api_name).startswith("lambda"))


def test_every_component_that_is_used_or_filled_has_an_id_of_its_page(demo: Any) -> None:
    components = [
        block
        for block in demo.blocks.values()
        if isinstance(block, Component) and not isinstance(block, State | Timer | Api)
    ]
    ids = [block.elem_id for block in components]

    assert len(components) > 30
    pages = "|".join(page.title.partition(".")[2] for page in PAGES)
    assert [id for id in ids if not re.fullmatch(rf"(top|{pages})(-[a-z0-9]+)*", id or "")] == []
    own = [id for id in ids if id and not id.startswith("top")]
    assert len(own) == len(set(own))


def test_every_input_has_a_label(demo: Any) -> None:
    for block in demo.blocks.values():
        if isinstance(block, Textbox | Slider | Checkbox | File):
            assert block.label, block.elem_id


def test_every_text_is_one_from_the_start(demo: Any) -> None:
    """A page may ask for what depends on a text before the browser has drawn it: without a value it would be null."""
    texts = [block for block in demo.blocks.values() if isinstance(block, Textbox)]

    assert len(texts) > 15
    assert [text.elem_id for text in texts if not isinstance(text.value, str)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_page_is_built_in_every_language(tmp_path: Path, language: str) -> None:
    pages = build(make_site(tmp_path), language).pages

    assert [path for path, *_ in pages] == [page.path.strip("/") for page in PAGES]


def test_the_web_ui_does_not_load_torch() -> None:
    script = "import sys, webui.server, webui.launch; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


# ---- Places and pictures ----


def test_a_path_is_resolved_in_the_workspace_or_refused(site: Site, tmp_path: Path) -> None:
    assert site.places.resolve("data/shapes") == site.places.root / "data" / "shapes"
    assert site.places.id_of(site.places.root / "data") == "data"
    (site.places.root / "out").symlink_to(tmp_path)
    for text in ("..", "/etc", "~", "out", "data/../..", ".lora-diffusion/queue.sqlite", "a\0b"):
        with pytest.raises(OutsideError):
            site.places.resolve(text)


def test_an_allowed_folder_may_be_used(workspace: Workspace, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "pictures"
    disk.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(disk / "a.png")
    site = make_site(workspace.root, (tmp_path / "disk",))

    assert site.places.resolve(str(disk)) == disk
    assert str(disk) in site.places.datasets()
    look = glance(site.places, str(disk))
    assert look is not None and look.num_images == 1
    assert site.pictures.thumbnail("dataset", look.pictures[0][0], 96)[8:12] == b"WEBP"


def test_what_can_be_chosen_is_found(site: Site) -> None:
    base = site.workspace.models / "my-base"
    base.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (site.workspace.models / "one.safetensors").write_bytes(b"")

    assert site.places.datasets() == ["data/shapes"]
    assert site.places.models() == ["models/my-base", "models/one.safetensors"]


def test_every_path_of_a_config_that_leads_out_is_named(site: Site) -> None:
    config = TrainConfig.parse(
        '[run]\nname = "x"\nsteps = 1\noutput = "/out"\n[model]\npath = "/base"\nmerge = ["../m.safetensors:0.5"]\n'
        '[adapter]\nstart_from = "~/a.safetensors"\n[[dataset]]\npath = "data"\n[[dataset]]\npath = "../data"\n'
        '[cache]\nfolder = "/cache"\n'
    )
    keys = {problem.key for problem in site.places.problems_of(config)}

    assert keys == {
        ("run", "output"),
        ("model", "path"),
        ("model", "merge", 0),
        ("adapter", "start_from"),
        ("dataset", 1, "path"),
        ("cache", "folder"),
    }


def test_every_key_that_holds_a_path_is_looked_at(site: Site) -> None:
    keys = set(path_keys(TrainConfig))
    assert {("run", "output"), ("model", "configs"), ("dataset", "path")} < keys
    settings = {(table, key): '"../out"' for table, key in keys} | {("run", "name"): '"x"', ("run", "steps"): "1"}
    settings[("model", "path")] = '"base"'
    toml = ""
    for table in dict.fromkeys(table for table, _ in settings):
        toml += f"[[{table}]]\n" if table == "dataset" else f"[{table}]\n"
        toml += "".join(f"{key} = {value}\n" for (other, key), value in settings.items() if other == table)

    problems = site.places.problems_of(TrainConfig.parse(toml))
    refused = {tuple(part for part in problem.key if isinstance(part, str)) for problem in problems}

    assert refused == keys


def path_keys(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a config whose values are paths and nothing else."""
    for name, field in section.model_fields.items():
        for kind in kinds(field.annotation):
            if kind is Path:
                yield (*above, name)
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from path_keys(kind, (*above, name))


def kinds(annotation: Any) -> Iterator[Any]:
    """What a union, a tuple or an annotated type consists of."""
    yield annotation
    for part in get_args(annotation):
        yield from kinds(part)


@pytest.mark.parametrize("link", ["l.safetensors", "l.safetensors:0.8"])
def test_a_merged_adapter_that_is_a_link_out_is_refused(site: Site, tmp_path: Path, link: str) -> None:
    (tmp_path / "secret.safetensors").touch()
    (site.places.root / link).symlink_to(tmp_path / "secret.safetensors")
    config = TrainConfig.parse(
        '[run]\nname = "x"\nsteps = 1\n[model]\npath = "base"\nmerge = ["l.safetensors:0.8"]\n'
        '[[dataset]]\npath = "data"\n'
    )

    assert [problem.key for problem in site.places.problems_of(config)] == [("model", "merge", 0)]


def test_a_thumbnail_is_made_once_and_anew_when_the_picture_changes(site: Site) -> None:
    picture = site.places.root / "data" / "shapes" / "0.png"
    first = site.pictures.thumbnail("dataset", "data/shapes/0.png", 50)
    assert site.pictures.thumbnail("dataset", "data/shapes/0.png", 96) == first
    assert len(list(site.workspace.thumbnails.iterdir())) == 1

    Image.new("RGB", (300, 200), "white").save(picture)
    os.utime(picture, ns=(1, 1))
    assert site.pictures.thumbnail("dataset", "data/shapes/0.png", 96) != first


@pytest.mark.parametrize("left", [0, 30])
def test_a_thumbnail_that_lost_its_end_is_made_again(site: Site, left: int) -> None:
    whole = site.pictures.thumbnail("dataset", "data/shapes/0.png", 50)
    (cached,) = site.workspace.thumbnails.iterdir()
    cached.write_bytes(whole[:left])

    assert site.pictures.thumbnail("dataset", "data/shapes/0.png", 50) == whole
    assert cached.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_file_that_is_no_picture_is_not_shown(site: Site, content: bytes) -> None:
    (site.places.root / "data" / "x.png").write_bytes(content)

    with pytest.raises(PictureError):
        site.pictures.thumbnail("dataset", "data/x.png", 96)


def test_a_glance_counts_pictures_and_captions(site: Site) -> None:
    look = glance(site.places, "data/shapes")

    assert look is not None
    assert (look.num_images, look.num_captioned) == (6, 5)
    assert look.pictures[2] == ("data/shapes/2.png", "a shape, number 2")
    assert glance(site.places, "data/none") is None
    assert glance(site.places, "/etc") is None


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_a_picture_of_every_kind_that_is_trained_is_listed_counted_and_shown(site: Site, suffix: str) -> None:
    folder = site.places.root / "data" / "kinds"
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / f"a{suffix}")

    assert "data/kinds" in site.places.datasets()
    look = glance(site.places, "data/kinds")
    assert look == Glance(1, 0, ((f"data/kinds/a{suffix}", ""),))
    assert {one["id"]: one["images"] for one in Datasets(site.places).all()}["data/kinds"] == 1
    assert site.pictures.thumbnail("dataset", f"data/kinds/a{suffix}", 96)[8:12] == b"WEBP"


def test_pictures_in_subfolders_are_a_data_set(site: Site) -> None:
    folder = site.places.root / "data" / "cats" / "10_sks"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")

    assert "data/cats" in site.places.datasets()
    assert glance(site.places, "data/cats") == Glance(1, 1, (("data/cats/10_sks/a.png", "a cat"),))


def test_the_address_fills_in_a_data_set_that_is_not_among_the_suggestions(site: Site) -> None:
    (site.places.root / "data" / "a" / "b" / "c").mkdir(parents=True)
    handlers = Handlers(site, Translator("en"), presets())

    form = handlers.open_page("", Request(query_params={"dataset": "data/a/b/c"}))

    assert "data/a/b/c" not in site.places.datasets()
    assert 'value="data/a/b/c"' in str(form)


def test_a_tiff_that_says_how_it_is_turned_is_shown_as_the_trainer_sees_it(site: Site) -> None:
    picture = site.places.root / "data" / "turned.tif"
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of what is stored belongs to the right
    image.save(picture, exif=exif)

    shown = Image.open(BytesIO(site.pictures.thumbnail("dataset", "data/turned.tif", 96))).convert("L")
    row, facts = shown.tobytes()[:40], look_at_header(picture)

    assert (shown.size, row[5] > 200, row[35] < 50) == ((40, 60), True, True)
    assert (facts.width, facts.height, facts.is_rotated) == (40, 60, False)


# ---- Runs ----


def test_runs_are_listed_with_what_they_were_trained_with(site: Site) -> None:
    site.queue.add('[run]\nname = "next"\nsteps = 9\n[model]\npath = "m/base"\n[[dataset]]\npath = "data/shapes"\n')
    rows = {row.id: row for row in Overview(site).rows()}

    assert next(iter(rows)) == "runs/next"
    assert rows.keys() == {"runs/next", "runs/done", "runs/broken"}
    assert rows["runs/next"].base == "base"
    assert rows["runs/done"].best == (0.2, 50)
    assert rows["runs/done"].picture == "runs/done/previews/000200-0.png"
    assert rows["runs/broken"].job.status == "failed"


def test_only_settings_that_differ_are_compared() -> None:
    a, b = {"run.steps": "1", "run.seed": "2"}, {"run.steps": "1", "run.seed": "3", "model.merge": "x"}

    assert differences([a, b]) == {"run.seed": ["2", "3"], "model.merge": ["", "x"]}


# ---- The check, as a process ----


def test_the_check_tells_why_it_could_not_look(site: Site) -> None:
    result = check(
        site.workspace,
        '[run]\nname = "x"\nsteps = 1\n[model]\npath = "no-base"\n[[dataset]]\npath = "data/shapes"\n',
    )

    assert result.report is None
    assert "no-base" in result.error
    assert "Traceback" not in result.error
    assert list(site.workspace.private.glob("check-*")) == []


@pytest.mark.slow
def test_the_check_reports_on_a_run(tiny_sd1: Path, site: Site) -> None:
    toml = f'[run]\nname = "x"\nsteps = 4\n[model]\npath = "{tiny_sd1}"\n'
    toml += '[[dataset]]\npath = "data/shapes"\nresolution = 64\n'
    result = check(site.workspace, toml)

    assert result.report is not None, result.error
    assert (result.report["images"], result.report["steps"], result.report["captions_missing"]) == (6, 4, 1)


def test_a_module_in_the_workspace_does_not_take_the_place_of_ours(site: Site) -> None:
    (site.workspace.root / "lora_diffusion.py").write_text("raise SystemExit('taken')")
    (site.workspace.root / "json.py").write_text("raise SystemExit('taken')")

    assert "taken" not in check(site.workspace, "nonsense = 1").error
