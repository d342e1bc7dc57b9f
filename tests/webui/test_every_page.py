"""Every page, on a desktop and a phone: nothing in the console, nothing from elsewhere, hostile texts as text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from lora_diffusion.container import read_header, with_metadata
from lora_diffusion.generation.infotext import save_png
from lora_diffusion.workspace import Workspace
from tests.webui.conftest import HOSTILE, make_run
from webui.app import PAGES

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

INK = Path(__file__).parents[2] / "samples" / "adapters" / "ink.safetensors"
TAG = "<img src=x onerror=alert(1)>"
WAIT_MS = 30_000

SHOWS: dict[str, tuple[str, str, str]] = {
    "/": ("", "#train-start", ""),
    "/dataset": ("?set=data/shapes&picture=1.png", "#dataset-grid .cell", "#dataset-grid"),
    "/runs": ("", "#runs-table", "#runs-table"),
    "/run": (f"?id={quote(f'runs/{TAG}')}", "#run-log", "#run-log"),
    "/generate": ("", "#generate-gallery .shot", "#generate-prompt textarea"),
    "/adapters": ("", "#adapters-cards .lora", "#adapters-cards"),
}
"""Page → its address's end, its main component, and where a hostile text of a file is to be read."""


@pytest.fixture()
def hostile(workspace: Workspace) -> Workspace:
    """Texts that would act if they were taken for HTML: names of runs and files, captions, logs, prompts, metadata."""
    root = workspace.root
    make_run(root / "runs" / TAG, steps=100, prompts=[HOSTILE])
    (root / "adapters").mkdir()
    metadata = dict(read_header(INK).metadata)
    texts = ("title", "trigger_phrase", "tags", "description", "author")
    metadata |= {f"modelspec.{key}": HOSTILE for key in texts}
    (root / "adapters" / f"x{TAG}.safetensors").write_bytes(with_metadata(INK.read_bytes(), metadata))
    (root / "data" / "shapes" / f"z{TAG}.png").write_bytes((root / "data" / "shapes" / "0.png").read_bytes())
    (root / "pictures").mkdir()
    text = f"{HOSTILE}\nNegative prompt: {HOSTILE}\nSteps: 7, Sampler: Euler a, CFG scale: 3.5, Seed: 7, Size: 64x64"
    save_png(Image.new("RGB", (64, 64)), root / "pictures" / f"20260101-000000-00-7{TAG}.png", text)
    return workspace


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", [page.path for page in PAGES])
def test_a_page_is_quiet_and_takes_texts_for_texts(
    hostile: Workspace, url: str, open_page: Callable[..., Any], path: str, width: int
) -> None:
    query, main, where = SHOWS[path]
    page = open_page(f"{url}{path}{query}", width=width, height=844)  # which fails for errors and foreign requests
    page.locator(main).first.wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(2500)  # a round of what pages ask again and again

    if where:
        text = page.locator(where).first
        said = text.input_value() if where.endswith("textarea") else text.inner_text()
        assert TAG in said
    made = "img[src=x], [onerror]" + ", script:not([src]):not([type])"
    own = page.evaluate(f"[...document.body.querySelectorAll('{made}')].map((node) => node.outerHTML)")
    assert [node for node in own if "alert(" in node] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("path", "main"), [("/dataset?set=data/shapes", ".cell"), ("/", "#train-problems .verdict")])
def test_a_page_waits_for_our_scripts_that_come_late(
    hostile: Workspace, url: str, open_page: Callable[..., Any], path: str, main: str
) -> None:
    page = open_page("about:blank")
    late: list[str] = []
    page.route("**/static-ui/*.js*", lambda route: (late.append(route.request.url), time.sleep(1.5), route.continue_()))
    page.goto(f"{url}{path}")

    expect(page.locator(main).first).to_be_visible(timeout=WAIT_MS)
    assert late, "no script came late: nothing was tested"


def test_the_inspector_takes_texts_for_texts(hostile: Workspace, url: str, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{url}/adapters")
    page.locator(".lora").first.click(timeout=WAIT_MS)

    expect(page.locator("#adapters-head h2")).to_contain_text("img src=x", timeout=WAIT_MS)
    expect(page.locator("#adapters-head .about")).to_contain_text(TAG, timeout=WAIT_MS)
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.timed
@pytest.mark.parametrize("path", [page.path for page in PAGES])
def test_every_page_shows_its_main_part_within_two_seconds(
    hostile: Workspace, url: str, open_page: Callable[..., Any], path: str
) -> None:
    query, main, _ = SHOWS[path]
    page = open_page(f"{url}{path}{query}")
    page.locator(main).first.wait_for(timeout=WAIT_MS)
    took: list[float] = []
    for _ in range(3):  # the first visit also starts the browser and fills its cache
        page.goto(f"{url}{path}{query}")
        page.locator(main).first.wait_for(timeout=WAIT_MS)
        took.append(page.evaluate("performance.now()") / 1000)
    print(f"{path}: {min(took):.2f} s")

    assert min(took) < 2.0


@pytest.mark.timed
@pytest.mark.slow
def test_two_thousand_adapters_are_listed_within_three_seconds(hostile: Workspace) -> None:
    from lora_diffusion.jobs.queue import Queue
    from webui.services.site import make_site

    first = hostile.root / "adapters" / "0.safetensors"
    shutil.copyfile(INK, first)
    for number in range(1, 2000):
        first.with_name(f"{number}.safetensors").hardlink_to(first)
    (hostile.root / "adapters" / "broken.safetensors").write_bytes(b"nothing")
    took: list[float] = []
    library = make_site(hostile.root, queue=Queue(hostile, start_runner=lambda _: None)).studio.library
    for _ in range(3):
        (hostile.private / "library.json").unlink(missing_ok=True)
        library = make_site(hostile.root, queue=Queue(hostile, start_runner=lambda _: None)).studio.library
        took.append(seconds_of(library.adapters))
    warm = seconds_of(library.adapters)
    adapters = library.adapters()
    found = seconds_of(lambda: [library.find(adapter.id) for adapter in adapters[:120]])
    print(f"cold {min(took):.2f} s, warm {warm:.2f} s, 120 pictures' files {found:.3f} s")

    own = [adapter for adapter in adapters if adapter.source == "library"]
    assert len(own) == 2002
    assert [adapter.name for adapter in own if adapter.facts.error] == ["broken"]
    assert min(took) < 3.0
    assert warm < min(took) / 4, "headers are read once"
    assert found < warm, "a picture does not look through the library"


def seconds_of(do: Callable[[], object]) -> float:
    began = time.monotonic()
    do()
    return time.monotonic() - began
