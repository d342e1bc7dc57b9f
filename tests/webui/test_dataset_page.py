"""The page of data sets in a browser, with a thousand pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from lora_diffusion.workspace import Workspace
from tests.webui.conftest import HOSTILE, QUESTIONS, Pages, lose, open_with_loss, wait_for

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

NUM_PICTURES = 48
SET = "data/many"
WAIT_MS = 20_000


@pytest.fixture()
def many(workspace: Workspace) -> Path:
    """Pictures of several shapes with tags; the first without a caption, the second with a hostile one."""
    folder = workspace.root / SET
    make_set(folder, NUM_PICTURES)
    (folder / "zz <img src=x onerror=alert(5)>.png").write_bytes((folder / "0003.png").read_bytes())
    return folder


def make_set(folder: Path, num_pictures: int) -> None:
    folder.mkdir()
    for number in range(num_pictures):
        size = ((96, 96), (128, 80), (80, 128), (200, 60))[number % 4]
        colour = (number * 7 % 256, number * 13 % 256, number * 29 % 256)
        Image.new("RGB", size, colour).save(folder / f"{number:04d}.png")
        if number:
            text = HOSTILE if number == 1 else f"harbour, {('dawn', 'noon', 'dusk')[number % 3]}, boat {number}"
            (folder / f"{number:04d}.txt").write_text(f"{text}\n")


@pytest.fixture()
def opened(many: Path, url: str, open_page: Callable[..., Any]) -> Any:
    """The set, looked at whole, so that no work goes on in the background."""
    page = open_page(f"{url}/dataset?set={quote(SET)}")
    page.wait_for_selector("#dataset-mend", timeout=60_000)
    return page


def count(page: Any) -> str:
    return page.locator("#dataset-count").inner_text()


def wait_for_count(page: Any, start: str) -> None:
    wait_for(lambda: count(page).startswith(start), 10)


@pytest.mark.timed
def test_a_thousand_pictures_are_there_within_two_seconds(
    workspace: Workspace, url: str, open_page: Callable[..., Any]
) -> None:
    make_set(workspace.root / "data" / "thousand", 1000)
    page = open_page(f"{url}/dataset")  # Gradio's own files are in the browser's cache, as for whoever is in the UI
    page.wait_for_selector("#dataset-sets")
    page.goto(f"{url}/dataset?set=data/thousand")
    page.wait_for_selector("#dataset-grid .cell")
    seconds = page.evaluate("performance.now()") / 1000

    page.wait_for_function("document.querySelectorAll('#dataset-grid .cell').length === 1000")
    page.wait_for_function(
        "[...document.querySelectorAll('.cell img')].filter((image) => image.naturalWidth).length > 20"
    )
    print(f"first grid after {seconds:.2f} s")
    assert seconds < 2


def test_a_caption_is_saved_while_it_is_written_and_the_page_opens_again_at_the_same_place(
    opened: Any, many: Path
) -> None:
    opened.locator('[data-name="0005.png"]').click()
    opened.locator("#dataset-caption").fill("a lighthouse, fog")
    wait_for(lambda: (many / "0005.txt").read_text() == "a lighthouse, fog\n")
    opened.wait_for_function("document.querySelector('#dataset-state').textContent === 'Saved'")
    opened.locator("#dataset-caption").press("Enter")

    opened.reload()
    opened.wait_for_selector("#dataset-caption")

    assert opened.locator(".editor-head strong").inner_text() == "0006.png"
    assert "/dataset?" in opened.url and "picture=0006.png" in opened.url
    opened.locator("#dataset-undo").click()
    wait_for(lambda: (many / "0005.txt").read_text() == "harbour, dusk, boat 5\n")


def warns_of_leaving(page: Any) -> bool:
    return not page.evaluate("dispatchEvent(new Event('beforeunload', { cancelable: true }))")


def test_what_is_written_while_the_server_is_away_is_saved_when_it_is_back(
    opened: Any, many: Path, open_page: Pages
) -> None:
    caption, state = opened.locator("#dataset-caption"), opened.locator("#dataset-state")
    lose(opened)
    opened.locator('[data-name="0005.png"]').click()
    caption.fill("a lighthouse, fog")
    caption.press("Enter")
    caption.fill("a pier, fog")
    expect(opened.locator("#dataset-said")).to_contain_text("stays in this page", timeout=WAIT_MS)
    expect(state).to_have_text("Not saved", timeout=WAIT_MS)
    assert warns_of_leaving(opened)
    opened.locator('[data-name="0005.png"]').click()
    expect(caption).to_have_value("a lighthouse, fog")
    expect(state).to_have_text("Not saved")
    opened.unroute(QUESTIONS)

    expect(state).to_have_text("Saved", timeout=WAIT_MS)
    wait_for(lambda: (many / "0006.txt").read_text() == "a pier, fog\n")
    assert (many / "0005.txt").read_text() == "a lighthouse, fog\n"
    expect(opened.locator("#dataset-said")).to_have_text("Saved", timeout=WAIT_MS)
    expect(opened.locator('[data-name="0006.png"] p')).to_have_text("a pier, fog", timeout=WAIT_MS)
    assert not warns_of_leaving(opened)
    caption.fill("a lighthouse, dawn")
    wait_for(lambda: (many / "0005.txt").read_text() == "a lighthouse, dawn\n")
    opened.locator("#dataset-undo").click()
    expect(opened.locator("#dataset-said")).to_contain_text("Undone", timeout=WAIT_MS)
    open_page.forgive_lost_connections()


def test_what_is_written_is_saved_also_when_the_data_set_was_left_meanwhile(
    opened: Any, many: Path, open_page: Pages
) -> None:
    lose(opened, "save")
    opened.locator('[data-name="0005.png"]').click()
    opened.locator("#dataset-caption").fill("a lighthouse, fog")
    opened.locator("#dataset-other").click()
    opened.locator('[data-set="data/shapes"]').click()
    opened.locator('[data-name="5.png"]').click(timeout=WAIT_MS)
    expect(opened.locator("#dataset-caption")).to_have_value("a shape, number 5", timeout=WAIT_MS)
    opened.unroute(QUESTIONS)

    wait_for(lambda: (many / "0005.txt").read_text() == "a lighthouse, fog\n")
    assert opened.locator("#dataset-caption").input_value() == "a shape, number 5"
    open_page.forgive_lost_connections()


def test_what_is_refused_as_the_file_has_changed_is_still_there_for_who_comes_back(opened: Any, many: Path) -> None:
    caption = opened.locator("#dataset-caption")
    opened.locator('[data-name="0005.png"]').click()
    (many / "0005.txt").write_text("by somebody else\n")
    caption.fill("a lighthouse, fog")
    caption.press("Enter")
    expect(opened.locator("#dataset-said")).to_contain_text("0005.png: The caption was changed", timeout=WAIT_MS)
    expect(opened.locator("#dataset-said")).to_contain_text("“by somebody else”")
    opened.locator('[data-name="0005.png"]').click()

    expect(caption).to_have_value("a lighthouse, fog")
    expect(opened.locator("#dataset-state")).to_have_text("Not saved")
    assert (many / "0005.txt").read_text() == "by somebody else\n"
    caption.fill("a lighthouse, by somebody else")
    wait_for(lambda: (many / "0005.txt").read_text() == "a lighthouse, by somebody else\n")


def test_the_keyboard_moves_edits_and_leaves(opened: Any, many: Path) -> None:
    opened.locator('[data-name="0002.png"]').click()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    opened.keyboard.press("End")
    opened.keyboard.type(", pier")
    opened.keyboard.press("Escape")
    wait_for(lambda: (many / "0003.txt").read_text() == "harbour, dawn, boat 3, pier\n")

    opened.keyboard.press("ArrowLeft")
    assert opened.locator(".editor-head strong").inner_text() == "0002.png"
    opened.locator("#dataset-quick-edit").click()
    opened.locator("#dataset-quick-tags").fill("calm, windy")
    opened.keyboard.press("Enter")
    opened.locator("#dataset-grid").focus()
    opened.keyboard.press("2")
    wait_for(lambda: (many / "0002.txt").read_text() == "harbour, dusk, boat 2, windy\n")


def test_find_and_replace_shows_what_it_will_do_and_is_undone(opened: Any, many: Path) -> None:
    before = {path.name: path.read_bytes() for path in many.iterdir()}
    opened.locator("#dataset-bulk").click()
    opened.locator("#dataset-bulk-text").fill("noon")
    opened.locator("#dataset-bulk-to").fill("midday")
    opened.locator("#dataset-bulk-preview").click()
    opened.wait_for_selector("#dataset-bulk-apply:visible")
    changed = [number for number in range(2, NUM_PICTURES) if number % 3 == 1]
    assert opened.locator("#dataset-bulk-apply").inner_text() == f"Apply to {len(changed)}"
    assert opened.locator(".change").count() == len(changed)
    assert opened.locator(".change del").first.text_content() == "noon"
    opened.locator(".change input").first.uncheck()
    opened.locator("#dataset-bulk-apply").click()
    opened.wait_for_selector("#dataset-said .good", timeout=20_000)

    assert (many / "0004.txt").read_bytes() == before["0004.txt"]
    assert all(
        (many / f"{number:04d}.txt").read_text() == f"harbour, midday, boat {number}\n" for number in changed[1:]
    )

    opened.locator("#dataset-undo").click()
    wait_for(lambda: "Undone" in opened.locator("#dataset-said").inner_text(), 20)
    assert {path.name: path.read_bytes() for path in many.iterdir()} == before


def test_a_pattern_that_never_ends_is_stopped(opened: Any) -> None:
    opened.locator('[data-name="0002.png"]').click()
    opened.locator("#dataset-caption").fill("a" * 60 + "!")
    opened.locator("#dataset-bulk").click()
    opened.locator("#dataset-bulk-text").fill("(a+)+$")
    opened.locator("#dataset-bulk-regex").check()
    opened.locator("#dataset-bulk-preview").click()
    opened.wait_for_selector("#dataset-bulk-said.bad", timeout=20_000)
    assert "stopped" in opened.locator("#dataset-bulk-said").inner_text()


def test_tags_and_checks_filter_the_grid(opened: Any) -> None:
    opened.locator('[data-term="dawn"]').click()
    wait_for_count(opened, f"{len([n for n in range(2, NUM_PICTURES) if n % 3 == 0])} of")
    opened.locator('[data-term="harbour"]').click(modifiers=["Shift"])
    wait_for_count(opened, "0 of")
    assert "not=harbour" in opened.url
    opened.locator("#dataset-clear").click()
    wait_for_count(opened, f"{NUM_PICTURES + 1} of")
    opened.locator('[data-check="uncaptioned"]').click()
    wait_for_count(opened, "2 of")
    opened.locator("#dataset-clear").click()
    opened.locator("#dataset-search").fill("boat 4")
    wait_for_count(opened, "9 of")


def test_the_crop_is_drawn_on_the_pictures(opened: Any) -> None:
    opened.locator("#dataset-crop").check()
    cut = opened.locator('[data-name="0003.png"] .cut')
    cut.wait_for()
    box, whole = cut.bounding_box(), opened.locator('[data-name="0003.png"] .fit').bounding_box()
    share = box["width"] * box["height"] / (whole["width"] * whole["height"])
    assert share == pytest.approx(1 - 0.1, abs=0.02)  # 200x60 is cut to 96x32
    assert opened.locator("#dataset-buckets .term").count() >= 3


def test_texts_of_files_stay_texts(opened: Any) -> None:
    opened.locator('[data-name="0001.png"]').click()
    assert opened.locator("#dataset-caption").input_value() == HOSTILE
    opened.locator(".cell[data-name^=zz]").click()
    assert opened.locator(".editor-head strong").inner_text() == "zz <img src=x onerror=alert(5)>.png"
    assert opened.locator("#dataset img[src=x]").count() == 0
    opened.locator("#dataset-bulk").click()
    opened.locator("#dataset-bulk-text").fill("script")
    opened.locator("#dataset-bulk-to").fill("<b>x</b>")
    opened.locator("#dataset-bulk-preview").click()
    opened.wait_for_selector(".change")
    assert opened.locator(".change b").count() == 0  # and `open_page` fails for any dialog


def test_files_are_uploaded_into_a_new_folder(
    workspace: Workspace, url: str, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dark square")
    (tmp_path / "no.png").write_text("<html>")
    page = open_page(f"{url}/dataset")
    page.locator("#dataset-upload-name").fill("from here")
    page.locator("#dataset-upload-files").set_input_files([tmp_path / "a.png", tmp_path / "a.txt", tmp_path / "no.png"])
    page.locator("#dataset-upload-start").click()
    page.locator("#dataset-upload-open").click()
    page.wait_for_selector('[data-name="a.png"]')

    assert sorted(path.name for path in (workspace.root / "data" / "from here").iterdir()) == ["a.png", "a.txt"]


def test_an_upload_that_got_no_answer_goes_on_where_it_was(
    workspace: Workspace, url: str, open_page: Pages, tmp_path: Path
) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.new("RGB", (64, 64), (1, 2, 3)).save(file)
    page = open_page(f"{url}/dataset")
    page.locator("#dataset-upload-name").fill("from here")
    page.locator("#dataset-upload-files").set_input_files(files)
    lose(page, "upload")
    page.locator("#dataset-upload-start").click()
    expect(page.locator(".upload .said.bad")).to_contain_text("did not answer", timeout=WAIT_MS)
    expect(page.locator(".upload .said.bad")).to_contain_text("0 of 2 files are there")
    page.unroute(QUESTIONS)
    page.locator("#dataset-upload-start").click()
    page.locator("#dataset-upload-open").click()
    page.wait_for_selector('[data-name="b.png"]')

    assert sorted(path.name for path in (workspace.root / "data" / "from here").iterdir()) == ["a.png", "b.png"]
    open_page.forgive_lost_connections()


def test_a_copy_is_followed_also_when_an_answer_is_lost(opened: Any, many: Path, open_page: Pages) -> None:
    lose(opened, "mending")
    opened.locator("#dataset-mend").click()
    opened.locator("#dataset-mend-start").click()
    expect(opened.locator("#dataset-mend-sheet [role=status]")).to_contain_text("did not answer", timeout=WAIT_MS)
    opened.unroute(QUESTIONS)
    opened.locator("#dataset-mend-open").click(timeout=WAIT_MS)

    expect(opened.locator("h1")).to_have_text("data/many-mended", timeout=WAIT_MS)
    open_page.forgive_lost_connections()


def test_pictures_are_looked_at_also_when_an_answer_is_lost(many: Path, url: str, open_page: Pages) -> None:
    page = open_with_loss(open_page, f"{url}/dataset?set={quote(SET)}", "look")

    expect(page.locator("#dataset-mend")).to_be_visible(timeout=60_000)
    open_page.forgive_lost_connections()


@pytest.mark.parametrize("language", ["", "/de"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_screen(
    workspace: Workspace, url: str, open_page: Callable[..., Any], width: int, scheme: str, language: str
) -> None:
    options = {"color_scheme": scheme, "locale": "de-DE" if language else "en-US"}
    page = open_page(f"{url}{language}/dataset?set=data/shapes", width=width, height=844, **options)
    page.locator('[data-name="3.png"]').click()
    page.wait_for_selector("#dataset-caption")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not re.search(r"dataset\.\w|\{\w+\}", page.locator("#dataset").inner_text())


def test_a_folder_outside_is_refused_with_words(url: str, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{url}/dataset?set=../../etc")
    page.wait_for_selector("#dataset .said.bad")
    assert "outside" in page.locator("#dataset .said.bad").inner_text()
