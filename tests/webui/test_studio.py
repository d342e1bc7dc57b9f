"""Generate and Adapters in a real browser, with the real engine on the base that ships."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lora_diffusion.container import read_header, with_metadata
from lora_diffusion.generation.infotext import save_png
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from tests.webui.conftest import HOSTILE, wait_for

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SAMPLES = Path(__file__).parents[2] / "samples"
FIRST_MS = 120_000  # the engine loads its base
WAIT_MS = 40_000

Open = Callable[..., Any]


@dataclass(frozen=True)
class Started:
    url: str
    site: Any

    @property
    def root(self) -> Path:
        return self.site.workspace.root


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A server over a workspace with the shipped base and adapters, and one file with hostile texts."""
    import uvicorn

    from webui.server import make_app
    from webui.services.site import make_site

    root = tmp_path_factory.mktemp("studio")
    for name in ("base", "adapters"):
        shutil.copytree(SAMPLES / name, root / "samples" / name)
    (root / "adapters").mkdir()
    ink = (SAMPLES / "adapters" / "ink.safetensors").read_bytes()
    metadata = dict(read_header(SAMPLES / "adapters" / "ink.safetensors").metadata)
    texts = ("title", "trigger_phrase", "tags", "description", "author")
    hostile = with_metadata(ink, metadata | {f"modelspec.{key}": HOSTILE for key in texts})
    (root / "adapters" / "x<img src=x onerror=alert(1)>.safetensors").write_bytes(hostile)
    site = make_site(root, queue=Queue(Workspace(root), start_runner=lambda _: None))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(make_app(site), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield Started(f"http://127.0.0.1:{port}", site)
    site.studio.desk.cancel()
    site.studio.engine.stop()
    server.should_exit = True
    thread.join(10)


def prompt_of(page: Any) -> Any:
    return page.locator("#generate-prompt textarea")


def set_number(page: Any, id: str, value: float) -> None:
    page.locator(f"#{id} input[type=number]").fill(str(value))
    page.locator(f"#{id} input[type=number]").blur()


def open_generate(studio: Started, open_page: Open, query: str = "", **options: Any) -> Any:
    page = open_page(f"{studio.url}/generate{query}", **options)
    expect(page.locator("#generate-stack .stack, #generate-stack .stack-empty").first).to_be_visible(timeout=WAIT_MS)
    return page


def open_with_ink(studio: Started, open_page: Open) -> Any:
    page = open_generate(studio, open_page, "?adapter=samples/adapters/ink.safetensors")
    expect(page.locator("#generate-stack output")).to_have_text("1", timeout=WAIT_MS)
    return page


def test_pictures_at_three_strengths_are_drawn_and_stay_after_a_reload(studio: Started, open_page: Open) -> None:
    page = open_with_ink(studio, open_page)
    page.get_by_text("fixed", exact=True).click()
    set_number(page, "generate-steps", 8)
    for number, strength in enumerate(("0", "0.5", "1"), 1):
        page.locator("#generate-stack input[type=range]").fill(strength)
        expect(prompt_of(page)).to_have_value(f"a red house under a yellow sun <lora:ink:{strength}>", timeout=WAIT_MS)
        page.locator("#generate-go").click()
        expect(page.locator(".shot")).to_have_count(number, timeout=FIRST_MS)

    prompt_of(page).fill("a blue fish <lora:ink:0.85>")  # and the other way round
    expect(page.locator("#generate-stack output")).to_have_text("0.85", timeout=WAIT_MS)
    assert page.locator("#generate-stack input[type=range]").input_value() == "0.85"
    page.reload()
    expect(page.locator(".shot")).to_have_count(3, timeout=WAIT_MS)
    pictures = [Image.open(path).convert("RGB") for path in sorted((studio.root / "pictures").glob("*.png"))]
    off, half, full = pictures
    assert ImageChops.difference(off, half).getbbox() and ImageChops.difference(half, full).getbbox()


def test_the_same_seed_with_and_without_the_adapter_stands_in_a_slider(studio: Started, open_page: Open) -> None:
    page = open_with_ink(studio, open_page)
    set_number(page, "generate-steps", 6)
    page.get_by_role("tab", name="With and without").click()
    page.locator("#generate-compare").click()

    expect(page.locator("#generate-slider img").first).to_be_visible(timeout=FIRST_MS)
    drawing = studio.site.studio.desk.latest("comparison")
    assert [dict(request.adapters) for request in drawing.requests] == [{}, {"ink": 1.0}]
    assert len({request.seed for request in drawing.requests}) == 1


def test_cancelling_ends_the_drawing_at_once_and_the_next_one_is_drawn(studio: Started, open_page: Open) -> None:
    page = open_with_ink(studio, open_page)
    set_number(page, "generate-steps", 100)
    set_number(page, "generate-count", 16)
    page.locator("#generate-go").click()
    expect(page.locator(".drawing")).to_contain_text("Step", timeout=FIRST_MS)
    page.locator("#generate-cancel").click()
    expect(page.locator(".drawing")).to_have_count(0, timeout=WAIT_MS)

    set_number(page, "generate-steps", 3)
    set_number(page, "generate-count", 1)
    page.locator("#generate-go").click()
    wait_for(lambda: studio.site.studio.desk.drawings()[0].phase == "done", 40)
    assert studio.site.studio.desk.drawings()[1].phase == "cancelled"


def test_a_grid_is_filled_and_can_be_taken_as_one_picture(studio: Started, open_page: Open) -> None:
    page = open_with_ink(studio, open_page)
    set_number(page, "generate-steps", 5)
    page.get_by_role("tab", name="Grid").click()
    page.locator("#generate-x-values textarea, #generate-x-values input").first.fill("0, 1")
    expect(page.locator("#generate-grid-about")).to_contain_text("4 pictures", timeout=WAIT_MS)
    page.locator("#generate-grid-go").click()

    expect(page.locator("#generate-grid-download")).to_be_visible(timeout=FIRST_MS)
    assert page.locator("#generate-grid td img").count() == 4
    with page.expect_download() as download:
        page.locator("#generate-grid-download").click()
    with Image.open(download.value.path()) as sheet:
        assert sheet.width > 300 and "X/Y/Z plot" in sheet.info["parameters"]
    page.locator("#generate-grid td img").last.click()
    expect(page.locator("#lightbox img")).to_be_visible(timeout=WAIT_MS)


def test_a_dropped_png_fills_the_fields_and_unknown_adapters_are_named(
    studio: Started, open_page: Open, tmp_path: Path
) -> None:
    text = (
        f"a {HOSTILE.replace('<', '(')} cup <lora:ink:0.6> <lora:gone:1>\nNegative prompt: blurry\n"
        "Steps: 7, Sampler: Euler a, CFG scale: 3.5, Seed: 77, Size: 64x96"
    )
    save_png(Image.new("RGB", (64, 96)), tmp_path / "found.png", text)
    page = open_generate(studio, open_page)
    page.locator("#generate-open button").first.click()
    page.locator("#generate-png input[type=file]").set_input_files(tmp_path / "found.png")

    expect(page.locator("#generate-said")).to_contain_text("Not in the library: gone", timeout=WAIT_MS)
    expect(page.locator("#generate-negative textarea, #generate-negative input").first).to_have_value("blurry")
    expect(page.locator("#generate-seed input")).to_have_value("77")
    expect(page.locator("#generate-steps input[type=number]")).to_have_value("7")
    expect(page.locator("#generate-height input")).to_have_value("96")
    expect(page.locator("#generate-size input")).to_have_value("64 × 96")
    expect(page.locator("#generate-stack output")).to_have_text("0.6", timeout=WAIT_MS)


def test_two_adapters_are_merged_looked_at_saved_and_drawn_with(studio: Started, open_page: Open) -> None:
    page = open_page(f"{studio.url}/adapters")
    for name in ("ink", "neon"):
        page.locator(f'.lora:has([data-name="{name}"]) .add').click(timeout=WAIT_MS)
    expect(page.locator("#adapters-mix output")).to_have_count(2, timeout=WAIT_MS)
    page.locator("#adapters-preview").click()
    expect(page.locator("#adapters-slider img").first).to_be_visible(timeout=FIRST_MS)
    page.locator("#adapters-merge-name input, #adapters-merge-name textarea").first.fill("both")
    page.locator("#adapters-merge-save").click()
    expect(page.locator("#adapters-said")).to_contain_text("both.safetensors", timeout=FIRST_MS)

    trial = studio.site.studio.desk.latest("trial")
    apart, merged = (Image.open(path).convert("RGB") for path in trial.pictures)
    worst = max(high for _, high in ImageChops.difference(apart, merged).getextrema())
    assert worst < 40  # concat is exact; float16 in the file is not
    page.goto(f"{studio.url}/generate?adapter=adapters/both.safetensors")
    expect(page.locator("#generate-stack output")).to_have_text("1", timeout=WAIT_MS)
    before = len(list((studio.root / "pictures").glob("*.png")))
    page.locator("#generate-go").click()
    wait_for(lambda: len(list((studio.root / "pictures").glob("*.png"))) > before, 60)


def test_an_adapter_is_inspected_and_described_and_hostile_texts_stay_texts(studio: Started, open_page: Open) -> None:
    page = open_page(f"{studio.url}/adapters")
    page.locator('.lora[data-id="samples/adapters/ink.safetensors"]').click(timeout=WAIT_MS)
    expect(page.locator("#adapters-inspection .bar-row")).to_have_count(16, timeout=FIRST_MS)
    expect(page.locator("#adapters-inspection .readers")).to_contain_text("ComfyUI")
    hostile = page.locator('.lora[data-id^="adapters/x"]')
    expect(hostile).to_contain_text("<script>")
    hostile.click()
    expect(page.locator("#adapters-head h2")).to_contain_text("img src=x", timeout=WAIT_MS)
    expect(page.locator("#adapters-inspection .bar-row")).to_have_count(16, timeout=FIRST_MS)
    page.get_by_role("tab", name="Describe").click()
    trigger = page.locator("#adapters-edit-trigger input, #adapters-edit-trigger textarea").first
    expect(trigger).to_have_value(HOSTILE, timeout=WAIT_MS)
    trigger.fill("inky")
    page.locator("#adapters-edit-save").click()
    expect(page.locator("#adapters-said")).to_contain_text("bit for bit", timeout=WAIT_MS)
    expect(page.locator('.lora[data-id^="adapters/x"]')).to_contain_text("inky", timeout=WAIT_MS)


def test_an_adapter_is_added_from_the_list_and_a_picture_is_drawn_again(studio: Started, open_page: Open) -> None:
    page = open_generate(studio, open_page)
    prompt_of(page).fill("a yellow boat")
    expect(page.locator("#generate-stack .stack-empty")).to_be_visible(timeout=WAIT_MS)
    add = page.locator("#generate-add")
    assert add.bounding_box()["height"] < 48  # a line
    add.locator("input").click()
    page.keyboard.type("neo")
    page.get_by_role("option", name="neon").click()
    expect(prompt_of(page)).to_have_value("a yellow boat <lora:neon:1>", timeout=WAIT_MS)
    expect(add.locator("input")).to_have_value("Add an adapter …", timeout=WAIT_MS)

    set_number(page, "generate-steps", 3)
    desk = studio.site.studio.desk
    page.locator("#generate-go").click()
    wait_for(lambda: any(it.requests[0].prompt == "a yellow boat" for it in desk.drawings()))
    first = desk.drawings()[0]
    wait_for(lambda: desk.get(first.id).phase == "done", 90)
    page.locator(".shot", has_text="a yellow boat").first.locator('[data-act="again"]').click(timeout=WAIT_MS)
    wait_for(lambda: desk.drawings()[0].id != first.id and desk.drawings()[0].phase == "done", 60)
    old, new = first.requests[0], desk.drawings()[0].requests[0]
    assert old.seed != new.seed
    assert (old.prompt, dict(old.adapters), old.steps) == (new.prompt, dict(new.adapters), new.steps)


def test_adapters_are_filtered_by_tag_and_words(studio: Started, open_page: Open) -> None:
    given = dict(read_header(SAMPLES / "adapters" / "neon.safetensors").metadata)
    data = (SAMPLES / "adapters" / "neon.safetensors").read_bytes()
    (studio.root / "adapters" / "tagged.safetensors").write_bytes(
        with_metadata(data, given | {"modelspec.tags": "signs, night"})
    )
    page = open_page(f"{studio.url}/adapters")
    card = page.locator('.lora[data-id="adapters/tagged.safetensors"]')
    expect(card).to_be_visible(timeout=WAIT_MS)
    page.locator("#adapters-tag input").click()
    page.get_by_role("option", name="night").click()
    expect(page.locator(".lora")).to_have_count(1, timeout=WAIT_MS)
    expect(card).to_be_visible()
    page.locator("#adapters-search input, #adapters-search textarea").first.fill("nothing like it")
    expect(page.locator(".lora")).to_have_count(0, timeout=WAIT_MS)


def test_an_adapter_is_copied_converted_made_smaller_and_deleted(studio: Started, open_page: Open) -> None:
    page = open_page(f"{studio.url}/adapters")
    page.locator('.lora[data-id="samples/adapters/neon.safetensors"]').click(timeout=WAIT_MS)
    expect(page.locator("#adapters-delete")).to_have_count(0)  # what ships stays
    page.locator("#adapters-copy").click(timeout=WAIT_MS)
    expect(page.locator("#adapters-head code")).to_have_text("adapters/neon.safetensors", timeout=WAIT_MS)
    copy = studio.root / "adapters" / "neon.safetensors"
    assert copy.read_bytes() == (SAMPLES / "adapters" / "neon.safetensors").read_bytes()

    page.get_by_role("tab", name="Convert, resize").click()
    name = page.locator("#adapters-new-name input, #adapters-new-name textarea").first
    expect(name).to_have_value("neon small", timeout=WAIT_MS)
    name.fill("neon peft")
    page.locator("#adapters-convert").click()
    expect(page.locator("#adapters-said")).to_contain_text("neon peft.safetensors is in", timeout=FIRST_MS)
    keys = read_header(studio.root / "adapters" / "neon peft.safetensors").tensors
    assert any(".lora_A." in key for key in keys)
    name.fill("neon small")
    set_number(page, "adapters-rank", 2)
    page.locator("#adapters-resize").click()
    expect(page.locator("#adapters-said")).to_contain_text("neon small.safetensors is in", timeout=FIRST_MS)
    small = read_header(studio.root / "adapters" / "neon small.safetensors").tensors
    assert {info.shape[0] for key, info in small.items() if "lora_down" in key} == {2}

    page.evaluate("window.confirm = () => true")
    page.locator("#adapters-delete").click()
    expect(page.locator("#adapters-said")).to_contain_text("neon.safetensors is in trash/", timeout=WAIT_MS)
    assert not copy.exists() and list((studio.root / "trash").rglob("neon.safetensors"))


def test_a_mix_is_baked_into_a_copy_of_the_base(studio: Started, open_page: Open) -> None:
    page = open_page(f"{studio.url}/adapters")
    page.locator('.lora:has([data-name="ink"]) .add').click(timeout=WAIT_MS)
    expect(page.locator("#adapters-mix output")).to_have_count(1, timeout=WAIT_MS)
    page.locator("#adapters-merge-name input, #adapters-merge-name textarea").first.fill("inked base")
    page.locator("#adapters-bake").click()
    expect(page.locator("#adapters-said")).to_contain_text("models/inked base is a base", timeout=FIRST_MS)
    unet = "unet/diffusion_pytorch_model.safetensors"
    baked, base = (folder / unet for folder in (studio.root / "models" / "inked base", SAMPLES / "base"))
    assert read_header(baked).tensors.keys() == read_header(base).tensors.keys()
    assert baked.read_bytes() != base.read_bytes()
    page.goto(f"{studio.url}/generate")
    page.locator("#generate-base input").click(timeout=WAIT_MS)
    expect(page.get_by_role("option", name="inked base")).to_be_visible(timeout=WAIT_MS)


@pytest.mark.parametrize("path", ["generate", "adapters"])
def test_the_pages_fit_a_phone_in_german_and_dark(studio: Started, open_page: Open, path: str) -> None:
    page = open_page(f"{studio.url}/de/{path}?__theme=dark", width=390, height=844, locale="de-DE")
    expect(page.locator(".lora, #generate-go").first).to_be_visible(timeout=WAIT_MS)

    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "dark" in page.locator("body").get_attribute("class")
