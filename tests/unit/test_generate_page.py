"""Handlers of the page Generate, called as Gradio calls them, with an engine that draws grey squares."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio import skip
from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.generation.infotext import save_png, write_parameters
from lora_diffusion.generation.request import Request
from lora_diffusion.runs import RunFolder
from tests.grey_engine import VALUES, GreyEngine, clicked, make_grey_site
from tests.queues import Bench, bench, toml, wait_for
from webui.pages.generate.layout import Fields
from webui.pages.generate.opening import Opening
from webui.pages.generate.ordering import Orders
from webui.pages.generate.results import Shown
from webui.services.bases import bases, find_base
from webui.services.site import Site, make_site
from webui.translate import Translator

INK = Path(__file__).parents[2] / "samples" / "adapters" / "ink.safetensors"
T = Translator("en")
TAB = "a tab"


@pytest.fixture()
def engine() -> GreyEngine:
    return GreyEngine()


@pytest.fixture()
def site(tmp_path: Path, engine: GreyEngine) -> Site:
    return make_grey_site(tmp_path, engine)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drawn(site: Site) -> list[Request]:
    """The requests of the latest order, once it is done."""
    until(lambda: not site.studio.desk.unfinished())
    return list(site.studio.desk.drawings()[0].requests)


@pytest.mark.parametrize(
    ("name", "values", "cells"),
    [
        ("cfg", "3, 7.5", [{"cfg": 3.0}, {"cfg": 7.5}]),
        ("sampler", "ddim, euler", [{"sampler": "ddim"}, {"sampler": "euler"}]),
        ("steps", "4, 8", [{"steps": 4}, {"steps": 8}]),
        ("adapter", "none, ink + neon:0.5", [{"adapters": {}}, {"adapters": {"ink": 1.0, "neon": 0.5}}]),
        ("prompt", "red | blue | dark green", [{"prompt": f"a {it} house"} for it in ("red", "blue", "dark green")]),
    ],
)
def test_a_grid_varies_what_its_axis_names_and_nothing_else(
    site: Site, name: str, values: str, cells: list[dict[str, Any]]
) -> None:
    assert Orders(site, T).grid(TAB, "models/b", name, values, "", "", *VALUES) == ""

    plain = {"prompt": "a red house", "steps": 20, "cfg": 5.0, "sampler": "ddim", "adapters": {}}
    for request, cell in zip(drawn(site), cells, strict=True):
        found = {key: getattr(request, key) for key in plain}
        assert found | {"adapters": dict(request.adapters)} == plain | cell
        assert (request.seed, request.size) == (7, (64, 64))


@pytest.mark.parametrize(
    ("name", "values"), [("sampler", "ddim, nonsense"), ("cfg", "high"), ("prompt", "green | red")]
)
def test_a_grid_of_what_there_is_not_is_refused_before_anything_is_drawn(site: Site, name: str, values: str) -> None:
    said = Orders(site, T).grid(TAB, "models/b", name, values, "", "", *VALUES)

    assert "said bad" in said
    assert site.studio.desk.drawings() == []
    assert "hint warn" in Orders(site, T).describe_grid(name, values, "", "", *VALUES)


def test_a_picture_is_drawn_again_with_another_seed_and_everything_else_as_it_was(site: Site) -> None:
    request = Request("a blue fish", "blurry", 77, 9, 3.5, (64, 64), "euler")
    site.workspace.pictures.mkdir()
    save_png(Image.new("RGB", (64, 64)), site.workspace.pictures / "a.png", write_parameters(request, "b", {}))

    *fields, said = Opening(site, T).act_on_picture("models/b", TAB, clicked(act="again", id="pictures/a.png"))

    (again,) = drawn(site)
    assert (again.prompt, again.negative, again.steps, again.cfg) == ("a blue fish", "blurry", 9, 3.5)
    assert (again.size, again.sampler) == ((64, 64), "euler")
    assert again.seed != 77
    assert said == "" and all(isinstance(value, dict) for value in fields)  # what stands in the fields stays


def test_a_sampler_that_is_not_here_is_named_and_neither_replaced_nor_drawn_with(site: Site) -> None:
    text = "a fish\nSteps: 9, Sampler: DPM++ 3M <b>SDE</b>, CFG scale: 3.5, Seed: 77, Size: 64x64"
    site.workspace.pictures.mkdir()
    picture = site.workspace.pictures / "a.png"
    save_png(Image.new("RGB", (64, 64)), picture, text)
    opening = Opening(site, T)

    *fields, dropped, _ = opening.open_png(str(picture), "models/b")
    *_, used = opening.act_on_picture("models/b", TAB, clicked(act="use", id="pictures/a.png"))
    *_, again = opening.act_on_picture("models/b", TAB, clicked(act="again", id="pictures/a.png"))

    for said in (dropped, used, again):
        assert "no sampler DPM++ 3M &lt;b&gt;SDE&lt;/b&gt; here" in str(said)
    names = [field.name for field in dataclasses.fields(Fields)]
    values = dict(zip(names, fields, strict=False))
    assert (values["steps"], values["sampler"]) == (9, skip())
    assert site.studio.desk.drawings() == []


def test_a_png_that_cannot_be_read_is_said_to_be_so_and_changes_nothing(site: Site, tmp_path: Path) -> None:
    damaged = tmp_path / "a.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n damaged")

    *fields, said, _ = Opening(site, T).open_png(str(damaged), "models/b")

    assert "said bad" in str(said) and "cannot be read" in str(said)
    assert all(field == skip() for field in fields)


@pytest.mark.parametrize(("size", "listed"), [((512, 768), "512x768"), ((640, 328), "")])
@pytest.mark.parametrize("dropped", [True, False])
def test_the_list_of_sizes_shows_a_pictures_size_or_that_it_is_ones_own(
    site: Site, size: tuple[int, int], listed: str, dropped: bool
) -> None:
    text = write_parameters(dataclasses.replace(Request("a cup"), size=size), "models/b", {})
    picture = site.places.root / "pictures" / "a.png"
    picture.parent.mkdir()
    save_png(Image.new("RGB", size), picture, text)
    opening = Opening(site, T)
    if dropped:
        *values, _, _ = opening.open_png(str(picture), "models/b")
    else:
        *values, _ = opening.act_on_picture("models/b", TAB, clicked(act="use", id="pictures/a.png"))

    names = [field.name for field in fields(Fields)]
    sizes: Any = values[-1]
    assert (values[names.index("width")], values[names.index("height")]) == size
    assert sizes.value == listed
    assert listed in [value for _, value in sizes.choices]


def test_a_run_that_trains_is_asked_for_the_picture_instead(site: Site, engine: GreyEngine) -> None:
    run = RunFolder(site.workspace.runs / "live")
    run.path.mkdir(parents=True)
    run.prepare(resume=False)
    run.config.write_text(
        f'[run]\nname = "live"\noutput = "{run.path}"\nsteps = 9\n[model]\npath = "b"\n[[dataset]]\npath = "d"\n'
    )
    engine.gate.clear()
    Orders(site, T).pictures(TAB, "models/b", *VALUES)
    with run.lock():
        run.begin(1, 9)
        said = Shown(site, T).act(clicked(act="live"))

    (asked,) = run.control.iterdir()
    content = json.loads(asked.read_text())
    assert (content["prompts"], content["seed"], content["steps"], content["cfg"]) == (["a red house"], 7, 20, 5.0)
    assert "live draws it" in said
    until(lambda: site.studio.desk.drawings()[0].phase == "cancelled")


# ---- The base, and what the browser kept ----

HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture()
def trained(site: Site) -> str:
    """The id of an adapter of a run on a base of the hub."""
    run = RunFolder(site.workspace.runs / "style")
    run.path.mkdir(parents=True)
    run.prepare(resume=False)
    run.config.write_text(f'[run]\nname = "style"\nsteps = 9\n[model]\npath = "{HUB_ID}"\n[[dataset]]\npath = "d"\n')
    with run.lock():
        run.begin(9, 9)
    shutil.copy(INK, run.adapter("style"))
    return "runs/style/style.safetensors"


def opened(site: Site, kept: str = "", **address: str) -> list[Any]:
    """What the page opens with: the fields, the stack, the size, the adapters, the bases."""
    request: Any = SimpleNamespace(query_params=address)
    return Opening(site, T).open_page(kept, "models/b", "a red house", request)


def test_the_base_of_a_run_on_the_hub_can_be_chosen_and_drawn_with(
    site: Site, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, vae = (tmp_path / f"hub/models--{HUB_ID.replace('/', '--')}/snapshots/1" / part for part in ("unet", "vae"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert [base.id for base in bases(site.places)] == ["models/b", HUB_ID]
    assert find_base(site.places, HUB_ID).family == ""

    for folder, config in (
        (unet, {"cross_attention_dim": 768, "sample_size": 64}),
        (vae, {"block_out_channels": [1] * 4}),
    ):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    refs = unet.parents[2] / "refs"
    refs.mkdir()
    (refs / "main").write_text("1")
    base = find_base(site.places, HUB_ID)
    assert (base.family, base.sizes[0], base.name) == ("sd1", (512, 512), "stable-diffusion-v1-5")
    assert Orders(site, T).pictures(TAB, HUB_ID, *VALUES)[0] == ""
    drawn(site)
    assert site.studio.desk.drawings()[0].base == HUB_ID


@pytest.mark.parametrize("id", ["", "models/gone", "../x", "/etc/passwd", "a/b/c", "a/..", "a/b c"])
def test_what_is_neither_here_nor_a_name_of_the_hub_is_no_base(site: Site, id: str) -> None:
    with pytest.raises(UserError):
        find_base(site.places, id)


def test_an_adapter_is_drawn_with_the_base_of_its_run(site: Site, trained: str) -> None:
    assert opened(site)[-1].value == "models/b"

    *values, bases = opened(site, adapter=trained)

    assert bases.value == HUB_ID
    form = dict(zip([field.name for field in fields(Fields)], values, strict=False))
    assert (form["width"], form["height"]) == find_base(site.places, HUB_ID).sizes[0]
    assert "<lora:style:1>" in str(form["prompt"])


def test_what_the_browser_kept_fills_the_fields_as_far_as_they_can_hold_it(site: Site, trained: str) -> None:
    kept = [HUB_ID, "typed", "blurry", 9, 3.5, "euler", 1, 2, 512, 640, 7, "next"]

    *values, bases = opened(site, json.dumps(kept))

    assert values[: len(kept) - 1] == kept[1:]
    assert bases.value == HUB_ID
    for index, wrong in enumerate([1, 2, [], "x", None, ["euler"], True, "2", {}, float("inf"), "1", "no"]):
        spoiled = opened(site, json.dumps([wrong if index == at else value for at, value in enumerate(kept)]))
        assert [type(value) for value in spoiled[: len(kept) - 1]].count(dict) == (index > 0)  # gr.skip()
    for nonsense in ("", "[", "[]", "{}", "[" * 10_000, json.dumps(["x" * 200_000] * len(kept))):
        assert isinstance(opened(site, nonsense)[0], dict)


KEPT = [HUB_ID, "a fish", "", 9, 3.5, "euler", 1, 2, 96, 128, 7, "next"]


def test_the_axes_that_the_browser_kept_are_those_of_the_grid(site: Site, trained: str) -> None:
    axes = ["seed", "1, 2, 3", "", "0.5"]

    assert opened(site, json.dumps([*KEPT, *axes]))[-6:-2] == axes
    spoiled = opened(site, json.dumps([*KEPT, "", 4, "gone", ["x"]]))
    assert spoiled[-6:-2] == [skip()] * 4
    assert spoiled[0] == "a fish"


def test_an_adapter_is_added_to_the_prompt_that_was_kept(site: Site, trained: str) -> None:
    site.workspace.adapters.mkdir()
    shutil.copy(INK, site.workspace.adapters / "ink.safetensors")
    shutil.copy(INK, site.workspace.runs / "style" / "style-000005.safetensors")

    def prompt(text: str, **address: str) -> object:
        return opened(site, json.dumps([KEPT[0], text, *KEPT[2:]]), **address)[0]

    assert prompt("a fish", adapter=trained) == "a fish <lora:style:1>"
    assert prompt("a fish <lora:ink:0.4>", adapter=trained) == "a fish <lora:ink:0.4> <lora:style:1>"
    assert prompt("a <lora:style:0.4> fish", adapter=trained) == "a <lora:style:0.4> fish"
    step = "runs/style/style-000005.safetensors"
    assert prompt("a fish <lora:style:0.4>", adapter=step) == "a fish <lora:style-000005:1>"
    assert str(prompt(" ", adapter=trained)).endswith("a red house under a yellow sun <lora:style:1>")


def test_an_adapter_leaves_the_size_as_it_is_where_its_base_is_chosen_already(site: Site, trained: str) -> None:
    names = [field.name for field in fields(Fields)]
    width, height = names.index("width"), names.index("height")
    for base, size in ((HUB_ID, (96, 128)), ("models/b", find_base(site.places, HUB_ID).sizes[0])):
        values = opened(site, json.dumps([base, *KEPT[1:]]), adapter=trained)
        assert (values[width], values[height]) == size


# ---- A run that is paused to draw ----


@pytest.fixture()
def work(site: Site) -> Iterator[Bench]:
    with bench(site.workspace.root) as made:
        yield made


@pytest.fixture()
def busy(work: Bench, engine: GreyEngine) -> Site:
    """A site with a run that was paused for a picture; `engine.gate` holds the picture back."""
    site = with_grey_engine(work, engine)
    engine.gate.clear()
    work.work_until_step(work.queue.add(toml(steps=5000)).id, 2)
    Orders(site, T).pictures(TAB, "models/b", *VALUES)
    assert "pauses" in Shown(site, T).act(clicked(act="pause"))
    work.work_until(1, "paused")
    return site


def with_grey_engine(work: Bench, engine: GreyEngine) -> Site:
    """What the web UI has when it starts."""
    site = make_site(work.queue.workspace.root, queue=work.queue)
    site.studio.desk.engine = engine
    return site


def draw_all(site: Site, engine: GreyEngine) -> None:
    """Returns when the desk has nothing left to do."""
    thread = site.studio.desk._thread
    assert thread is not None
    engine.gate.set()
    thread.join(10)
    assert not thread.is_alive() and site.studio.desk.drawings()[0].phase == "done"


def test_a_run_that_was_paused_to_draw_goes_on_when_all_is_drawn(busy: Site, work: Bench, engine: GreyEngine) -> None:
    draw_all(busy, engine)

    assert work.queue.job(1).status == "queued"
    work.queue.pause(1)
    Orders(busy, T).pictures(TAB, "models/b", *VALUES)
    draw_all(busy, engine)
    assert work.queue.job(1).status == "paused", "this time a person paused it"


def test_a_run_that_someone_stopped_while_pictures_were_drawn_stays_stopped(
    busy: Site, work: Bench, engine: GreyEngine
) -> None:
    work.queue.stop(1)

    draw_all(busy, engine)

    assert work.queue.job(1).status == "stopped"


def test_a_run_that_was_paused_to_draw_goes_on_after_the_web_ui_was_killed(
    busy: Site, work: Bench, engine: GreyEngine
) -> None:
    again = with_grey_engine(work, engine)

    assert work.queue.job(1).status == "queued"
    work.queue.pause(1)
    with_grey_engine(work, engine)
    assert work.queue.job(1).status == "paused"
    again.studio.desk.cancel()
    busy.studio.desk.cancel()


@pytest.mark.parametrize("is_killed", [False, True], ids=["drawn", "web UI killed"])
def test_what_waits_leaves_the_device_to_the_drawing_and_then_goes_on_in_its_order(
    work: Bench, engine: GreyEngine, is_killed: bool
) -> None:
    site = with_grey_engine(work, engine)
    engine.gate.clear()
    failed = work.queue.add(toml("failed", how="nan")).id
    work.work_until(failed, "failed")
    first, cancelled, last = (work.queue.add(toml(name, steps=5000)).id for name in ("first", "cancelled", "last"))
    work.queue.retry(failed)
    work.queue.move(failed, 3)
    work.work_until_step(first, 2)
    Orders(site, T).pictures(TAB, "models/b", *VALUES)
    Shown(site, T).act(clicked(act="pause"))
    work.work_until(first, "paused")

    for _ in range(3):
        work.runner.turn()
    assert [work.queue.job(id).status for id in (cancelled, failed, last)] == ["paused", "failed", "paused"]
    work.queue.cancel(cancelled)
    if is_killed:
        with_grey_engine(work, engine)
        site.studio.desk.cancel()
    else:
        draw_all(site, engine)

    waiting = [job.id for job in work.queue.jobs() if job.status == "queued"]
    assert waiting == [first, failed, last]


@pytest.mark.parametrize("is_again", [False, True], ids=["", "paused again"])
def test_what_is_added_while_a_run_is_paused_to_draw_waits_until_all_is_drawn(
    busy: Site, work: Bench, engine: GreyEngine, is_again: bool
) -> None:
    added = work.queue.add(toml("added", steps=5000)).id
    wait_for(lambda: not work.runner.turn(), 10)
    assert work.queue.job(added).status == "queued"

    if is_again:  # someone has let the run go on, and then wants the picture after all
        work.queue.resume(1)
        work.work_until_step(1, 3)
        Shown(busy, T).act(clicked(act="pause"))
        work.work_until(1, "paused")
    draw_all(busy, engine)

    assert [job.id for job in work.queue.jobs() if job.status == "queued"] == [1, added]
    work.queue.pause(1)
    work.work_until_step(added, 1)


def test_a_run_is_not_left_paused_when_the_last_picture_was_done_meanwhile(
    site: Site, work: Bench, engine: GreyEngine
) -> None:
    studio = with_grey_engine(work, engine).studio
    work.work_until_step(work.queue.add(toml(steps=5000)).id, 2)
    paused = work.process(1)

    studio.pause_training()

    wait_for(lambda: work.runner.turn() and not paused.is_running())  # it was asked to pause, and obeys
    assert work.work_until_step(1, 3).status == "running"
    assert work.process(1) != paused


def test_what_of_an_adapter_file_has_no_effect_is_said_when_its_pictures_are_done(
    site: Site, engine: GreyEngine
) -> None:
    engine.warnings = ("odd: <2> tensors were not read",)
    Orders(site, T).pictures(TAB, "models/b", *VALUES[:6], 2, *VALUES[7:])
    drawn(site)
    assert Shown(site, T).draw(TAB)[0].count("odd: &lt;2&gt; tensors were not read") == 1

    engine.warnings = ()
    Orders(site, T).pictures(TAB, "models/b", *VALUES)
    drawn(site)
    assert "odd" not in Shown(site, T).draw(TAB)[0]
