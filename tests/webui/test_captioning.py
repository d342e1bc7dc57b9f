"""Captions by a model, from the page of data sets to the files: the real process with a tiny random BLIP."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from tests.captioners import save_tiny_blip
from tests.webui.conftest import HOSTILE, Pages, open_with_loss, wait_for

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

WAIT_MS = 90_000
"""The captioning imports torch and transformers, on machines that do other things too."""


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture()
def shapes(workspace: Workspace, blip: Path) -> Path:
    """Six pictures, the first without a caption, the second with a hostile one; a captioner in models/."""
    shutil.copytree(blip, workspace.models / "blip")
    return workspace.datasets / "shapes"


def captions(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}


def made(queue: Queue) -> dict[str, str]:
    (job,) = (job for job in queue.jobs() if job.kind == "caption")
    values = json.loads((job.run / "proposals.json").read_text())
    return {name: one["caption"] for name, one in values["made"].items()}


def start(page: Any, *, which: str, fill: bool = False, prefix: str = "") -> None:
    page.locator("#dataset-captioning > summary").click()
    page.locator("#dataset-caption-which").select_option(which)
    page.locator("#dataset-caption-prefix").fill(prefix)
    if fill:
        page.locator("#dataset-caption-fill").check()
    page.locator("#dataset-caption-start").click()
    page.wait_for_selector("#dataset-caption-job[data-status=finished]", timeout=WAIT_MS)


def test_proposals_are_looked_at_accepted_rejected_and_undone(
    workspace: Workspace, queue: Queue, shapes: Path, url: str, open_page: Callable[..., Any]
) -> None:
    before = captions(shapes)
    page = open_page(f"{url}/dataset?set=data/shapes")
    start(page, which="all", prefix="sks,")
    proposed = made(queue)
    assert proposed.keys() == {f"{number}.png" for number in range(6)}
    assert all(caption.startswith("sks,") for caption in proposed.values())
    assert captions(shapes) == before, "nothing is written before somebody has accepted it"

    page.locator("#dataset-caption-review").click()
    row = {number: page.locator(f'.review-row[data-name="{number}.png"]') for number in range(6)}
    # What they say, also while the browser has yet to draw them: rows are drawn when they come into view.
    assert row[1].locator(".old span").text_content() == HOSTILE
    assert row[2].locator(".old span").text_content() == "a shape, number 2"
    assert row[2].locator("textarea").input_value() == proposed["2.png"]
    row[2].locator(".accept").click()
    wait_for(lambda: captions(shapes)["2.txt"] == f"{proposed['2.png']}\n")
    row[3].locator(".reject").click()
    row[3].locator(".verdict").wait_for()
    row[4].locator("textarea").fill("a shape of my own")
    row[4].locator(".accept").click()
    wait_for(lambda: captions(shapes)["4.txt"] == "a shape of my own\n")
    assert captions(shapes) == before | {"2.txt": f"{proposed['2.png']}\n", "4.txt": "a shape of my own\n"}

    page.locator("#dataset-review-close").click()
    page.locator("#dataset-undo").click()
    wait_for(lambda: captions(shapes)["4.txt"] == before["4.txt"])
    page.locator("#dataset-undo").click()
    wait_for(lambda: captions(shapes) == before)
    page.wait_for_function("document.querySelector('#dataset-caption-review').textContent.includes('5')")

    page.reload()
    page.locator("#dataset-captioning > summary").click()
    page.locator("#dataset-caption-review").click()
    page.wait_for_selector("#dataset-review-sheet")
    assert page.locator(".review-row").count() == 5, "what was rejected stays rejected, what was undone is asked again"
    page.locator("#dataset-review-accept-all").click()
    wait_for(lambda: captions(shapes)["0.txt"] == f"{proposed['0.png']}\n" if "0.txt" in captions(shapes) else False)
    page.locator("#dataset-review-close").click()
    page.locator("#dataset-undo").click()
    wait_for(lambda: captions(shapes) == before)


def test_pictures_without_a_caption_are_filled_if_one_wants_that_and_it_can_be_undone(
    workspace: Workspace, queue: Queue, shapes: Path, url: str, open_page: Callable[..., Any]
) -> None:
    before = captions(shapes)
    page = open_page(f"{url}/dataset?set=data/shapes")
    start(page, which="missing", fill=True, prefix="sks,")
    page.wait_for_selector("#dataset-said .good")

    assert captions(shapes) == before | {"0.txt": f"{made(queue)['0.png']}\n"}
    assert page.locator('[data-name="0.png"] p').text_content() == made(queue)["0.png"]
    page.locator("#dataset-undo").click()
    wait_for(lambda: captions(shapes) == before)


def test_what_went_wrong_is_told_and_a_captioner_elsewhere_is_refused(
    workspace: Workspace, shapes: Path, url: str, open_page: Callable[..., Any], tmp_path: Path, blip: Path
) -> None:
    page = open_page(f"{url}/dataset?set=data/shapes")
    page.locator("#dataset-captioning > summary").click()
    page.locator("#dataset-caption-captioner").select_option(label="another one …")
    page.locator("#dataset-caption-path").fill(str(blip))
    page.locator("#dataset-caption-start").click()
    page.wait_for_selector("#dataset-captioning .said.bad:visible")
    assert "outside" in page.locator("#dataset-captioning .said.bad").inner_text()

    config = workspace.models / "blip" / "tokenizer.json"
    config.write_text("{}")
    page.locator("#dataset-caption-captioner").select_option("models/blip")
    page.locator("#dataset-caption-start").click()
    page.wait_for_selector("#dataset-caption-job[data-status=failed]", timeout=WAIT_MS)
    assert "models/blip: transformers cannot use this captioner" in page.locator("#dataset-caption-job").inner_text()


@pytest.fixture()
def proposals(workspace: Workspace, shapes: Path) -> None:
    """As if a captioning of data/shapes had ended. To be asked for before `url`, whose runner would begin it."""
    from lora_diffusion.captioning.proposals import Proposal, Proposals, proposals_file
    from lora_diffusion.config_captions import CaptionOrder
    from lora_diffusion.runs import RunFolder

    queue = Queue(workspace, start_runner=lambda _: None)
    order = CaptionOrder.of(folder="data/shapes", captioner="models/blip", overwrite=True, write="none")
    job = queue.add_captions(order)
    queue.cancel(job.id)
    names = [f"{number}.png" for number in range(6)]
    caption = f"a red house under a yellow sun {HOSTILE}"
    made = {name: Proposal(caption, None if name == "0.png" else "x") for name in names}
    Proposals(made, {"broken.png": "not a picture but an HTML page"}).write(proposals_file(job.run))
    run = RunFolder(job.run)
    run.begin(len(made), len(made))
    run.end("finished")


def test_captionings_are_followed_also_when_an_answer_is_lost(proposals: None, url: str, open_page: Pages) -> None:
    page = open_with_loss(open_page, f"{url}/dataset?set=data/shapes", "captioning")

    expect(page.locator("#dataset-caption-state")).to_contain_text("6", timeout=WAIT_MS)  # the page asks every 15 s
    open_page.forgive_lost_connections()


@pytest.mark.parametrize(("scheme", "language"), [("light", ""), ("dark", "/de")])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_section_and_the_sheet_fit_the_screen(
    proposals: None, url: str, open_page: Callable[..., Any], tmp_path: Path, width: int, scheme: str, language: str
) -> None:
    options = {"color_scheme": scheme, "locale": "de-DE" if language else "en-US"}
    page = open_page(f"{url}{language}/dataset?set=data/shapes", width=width, height=844, **options)
    page.locator("#dataset-captioning > summary").click()
    page.wait_for_selector("#dataset-caption-review")
    page.wait_for_selector("#dataset-mend", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"section-{width}-{scheme}{language.replace('/', '-')}.png")
    page.locator("#dataset-caption-review").click()
    sheet = page.locator("#dataset-review-sheet")
    sheet.locator(".reject").first.click()
    sheet.locator(".verdict").wait_for()
    page.screenshot(path=tmp_path / f"sheet-{width}-{scheme}{language.replace('/', '-')}.png")

    assert sheet.evaluate("element => element.scrollWidth <= element.clientWidth")
    assert sheet.locator("img[src=x]").count() == 0
    assert not re.search(r"dataset\.\w|review\.\w|caption\.\w|\{\w+\}", page.locator("#dataset").inner_text())
